use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// An HTTP answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status, or 0 where there was no answer.
    pub status: u16,
    /// Head and body as they came.
    pub text: String,
}

/// One request over a connection of its own, as curl would.
pub fn get(port: u16, path: &str, headers: &[(&str, &str)]) -> Answer {
    let call = || -> std::io::Result<String> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut request = format!("GET {path} HTTP/1.1\r\nhost: localhost:{port}\r\nconnection: close\r\n");
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let text = call().unwrap_or_else(|error| error.to_string());
    let status = text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).unwrap_or(0);
    Answer { status, text }
}

/// Requests at a steady rate until it is told to stop.
pub struct Load {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    failed: AtomicU64,
}

/// What a load saw.
#[derive(Debug)]
pub struct LoadReport {
    /// Requests that were sent.
    pub sent: u64,
    /// Those that were not answered with 200.
    pub failed: u64,
}

impl Load {
    /// Starts `rate` requests a second for a path.
    pub fn start(port: u16, path: &'static str, rate: u64) -> Load {
        // Enough that pages which take a second do not slow the rate down much.
        const WORKERS: u64 = 64;
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Counts::default());
        let worker = |_| {
            let (stop, counts) = (stop.clone(), counts.clone());
            std::thread::spawn(move || {
                let pause = Duration::from_micros(1_000_000 * WORKERS / rate);
                let mut next = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    let answer = get(port, path, &[]);
                    counts.sent.fetch_add(1, Ordering::Relaxed);
                    if answer.status != 200 {
                        counts.failed.fetch_add(1, Ordering::Relaxed);
                        eprintln!("failed under load: {}", answer.text.lines().next().unwrap_or_default());
                    }
                    // A request that took longer than the pause is not made up for.
                    next = (next + pause).max(Instant::now());
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            })
        };
        Load { workers: (0..WORKERS).map(worker).collect(), stop, counts }
    }

    /// Stops it and tells what it saw.
    pub fn stop(self) -> LoadReport {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            let _ = worker.join();
        }
        LoadReport {
            sent: self.counts.sent.load(Ordering::Relaxed),
            failed: self.counts.failed.load(Ordering::Relaxed),
        }
    }
}
