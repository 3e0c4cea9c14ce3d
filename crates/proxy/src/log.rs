//! Access log sinks: one buffer per file and worker, written in whole records.

mod als;

pub(crate) use als::{Entry, fields as to_struct};

use crate::export::{self, Item, Target, When, otlp};
use mesh_types::ArcStr;
use proxy_core::AccessLog;
use proxy_core::FormatContext;
use proxy_core::access_log::{LogSink, OtlpLog};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

/// Open log files by path, shared by workers; `O_APPEND` keeps whole writes apart.
#[derive(Default)]
pub(crate) struct LogFiles(Mutex<HashMap<ArcStr, Arc<File>>>);

impl LogFiles {
    /// Opens (or finds) a log.
    pub(crate) fn open(&self, path: &ArcStr) -> std::io::Result<Arc<File>> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(path) {
            return Ok(file.clone());
        }
        // The streams are duplicated: opening them again needs rights on the pipe, which another user may have made.
        let file = match &**path {
            "/dev/stdout" => File::from(std::io::stdout().as_fd().try_clone_to_owned()?),
            "/dev/stderr" => File::from(std::io::stderr().as_fd().try_clone_to_owned()?),
            path => OpenOptions::new().append(true).create(true).mode(0o644).open(path)?,
        };
        let file = Arc::new(file);
        files.insert(path.clone(), file.clone());
        Ok(file)
    }
}

/// A record for an OpenTelemetry collector (Envoy `open_telemetry/access_log_impl.cc`).
fn otlp_record(log: &OtlpLog, cx: &FormatContext<'_>, node: &crate::bootstrap::NodeInfo) -> (Target, Item) {
    let text = |format: &proxy_core::Format| {
        let mut out = Vec::new();
        format.write(cx, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    };
    let mut resource: Vec<(ArcStr, ArcStr)> = Vec::new();
    if !log.disable_builtin_labels {
        let zone = node.message.locality.as_ref().map(|l| l.zone.as_str()).unwrap_or_default();
        resource.push(("log_name".into(), log.name.clone()));
        resource.push(("zone_name".into(), zone.into()));
        resource.push(("cluster_name".into(), node.cluster.as_str().into()));
        resource.push(("node_name".into(), node.id.as_str().into()));
    }
    resource.extend(log.resource.iter().cloned());
    let time = cx.info.start.duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap_or_default();
    let record = otlp::LogRecord {
        time_unix_nano: time.as_nanos() as u64,
        body: log.body.as_ref().map(|body| otlp::AnyValue { text: Some(text(body)) }),
        attributes: log.attributes.iter().map(|(name, format)| otlp::KeyValue::text(name, &text(format))).collect(),
    };
    (Target::Logs { to: log.service.clone(), resource }, Item::Log(record))
}

/// Writes or sends a record to each of the logs that wants one.
pub(crate) fn write(worker: &Rc<crate::worker::Worker>, logs: &[Arc<AccessLog>], cx: &FormatContext<'_>) {
    let mut wrote = false;
    for log in logs {
        let random = &worker.random;
        match &log.sink {
            LogSink::Otlp(collector) => {
                if log.wants(cx, &mut random.borrow_mut()) {
                    let (target, item) = otlp_record(collector, cx, &worker.shared.node);
                    let when = When::Bytes { most: collector.buffer_bytes, after: collector.flush_interval };
                    export::send(worker, target, item, when);
                }
            }
            LogSink::Als(service) => {
                if log.wants(cx, &mut random.borrow_mut()) {
                    let target = Target::Als { to: service.service.clone(), log: service.name.clone() };
                    let when = When::Bytes { most: service.buffer_bytes, after: service.flush_interval };
                    export::send(worker, target, Item::Als(als::entry(service, cx)), when);
                }
            }
            LogSink::File(_) | LogSink::Stdout | LogSink::Stderr => {
                wrote = true;
                worker.logs.record(&log.sink, |out| log.write(cx, &mut random.borrow_mut(), out));
            }
        }
    }
    if wrote {
        LogBuffers::schedule(worker);
    }
}

/// Records wait at most until this many bytes are there…
const FLUSH_AT: usize = 64 * 1024;
/// …or this time has passed. Envoy waits 10 s; people look at logs sooner.
const FLUSH_EVERY: std::time::Duration = std::time::Duration::from_millis(250);

/// A worker's log buffers.
pub(crate) struct LogBuffers {
    shared: Arc<crate::runtime::Shared>,
    buffers: RefCell<foldhash::HashMap<ArcStr, Buffer>>,
    scheduled: std::cell::Cell<bool>,
}

struct Buffer {
    file: Option<Arc<File>>,
    bytes: Vec<u8>,
}

impl LogBuffers {
    pub(crate) fn new(shared: Arc<crate::runtime::Shared>) -> Self {
        Self { shared, buffers: RefCell::default(), scheduled: std::cell::Cell::new(false) }
    }

    /// Lets `write` append one record for `sink`.
    fn record(&self, sink: &LogSink, write: impl FnOnce(&mut Vec<u8>) -> bool) {
        let path = match sink {
            LogSink::File(path) => path,
            LogSink::Stdout => "/dev/stdout",
            LogSink::Stderr => "/dev/stderr",
            _ => return,
        };
        let mut buffers = self.buffers.borrow_mut();
        let buffer = match buffers.get_mut(path) {
            Some(buffer) => buffer,
            None => {
                let path = ArcStr::from(path);
                let file = self.shared.logs.open(&path);
                if let Err(e) = &file {
                    tracing::error!(%path, error = %e, "cannot open the access log");
                }
                buffers.entry(path).or_insert(Buffer { file: file.ok(), bytes: Vec::new() })
            }
        };
        if write(&mut buffer.bytes) && buffer.bytes.len() >= FLUSH_AT {
            buffer.flush();
        }
    }

    /// Writes everything out.
    pub(crate) fn flush(&self) {
        for buffer in self.buffers.borrow_mut().values_mut() {
            buffer.flush();
        }
    }

    /// Sees to it that records do not wait for ever.
    fn schedule(worker: &Rc<crate::worker::Worker>) {
        if worker.logs.scheduled.replace(true) {
            return;
        }
        let weak = Rc::downgrade(worker);
        // Ends by itself; the worker's end flushes too.
        tokio::task::spawn_local(async move {
            tokio::time::sleep(FLUSH_EVERY).await;
            if let Some(worker) = weak.upgrade() {
                worker.logs.scheduled.set(false);
                worker.logs.flush();
            }
        });
    }
}

impl Buffer {
    fn flush(&mut self) {
        if self.bytes.is_empty() {
            return;
        }
        if let Some(file) = &self.file
            && let Err(e) = (&**file).write_all(&self.bytes)
        {
            tracing::debug!(error = %e, "cannot write the access log");
        }
        self.bytes.clear();
        if self.bytes.capacity() > FLUSH_AT / 4 {
            self.bytes = Vec::new();
        }
    }
}

impl Drop for LogBuffers {
    fn drop(&mut self) {
        self.flush();
    }
}
