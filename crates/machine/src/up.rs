//! `outrigger up`: from YAML to a running mesh, until Ctrl-C or `outrigger down`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::args::UpArgs;
use crate::check::wire::Tap;
use crate::check::{self, Check};
use crate::cluster::command::{Command, PodRow};
use crate::cluster::{Cluster, Parts, Remote};
use crate::container::Spawner;
use crate::control::{self, Info};
use crate::folder::{Folder, Held};
use crate::network::publish::{self, Gateway, Publish};
use crate::network::{Dialer, Network, OUTSIDE_PORT, dns, outside};
use crate::plane::{Plane, SyncWatch};
use crate::progress::Progress;
use crate::{detach, live, load, logs, needs, rootless};

/// Runs the mesh until it is told to end.
pub fn up(args: &UpArgs) -> anyhow::Result<ExitCode> {
    needs::check()?;
    if !rustix::process::geteuid().is_root() {
        return rootless::run();
    }
    let progress = Progress::new();
    if args.background {
        // The terminal's end shall not be the mesh's.
        rustix::process::setsid().context("leave the terminal")?;
    }
    let input = load::load(&args.paths, args.recursive);
    for line in &input.skipped {
        progress.warn(line);
    }
    if !input.errors.is_empty() {
        for error in &input.errors {
            eprintln!("error: {error}");
        }
        bail!("nothing was started: {} in the YAML", plural(input.errors.len(), "error"));
    }
    let folder = Folder::of(&args.mesh.name)?;
    if args.detach && !args.background {
        return detach::run(args, &folder);
    }
    let held = folder.hold()?;
    // Started before the runtime, as the thread that makes containers must be the last to go.
    let spawner = Spawner::start_thread().context("start a thread")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let outcome = runtime.block_on(run(args, input, &held, spawner, &progress));
    runtime.shutdown_timeout(Duration::from_secs(1));
    drop(held);
    outcome
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 { format!("one {noun}") } else { format!("{count} {noun}s") }
}

async fn run(
    args: &UpArgs,
    input: load::Input,
    held: &Held,
    spawner: Spawner,
    progress: &Progress,
) -> anyhow::Result<ExitCode> {
    let folder = held.folder();
    // As containers see it: a link of the host may lead through a folder that is another one there.
    let envoy =
        args.envoy.as_ref().map(|file| file.canonicalize().with_context(|| format!("--envoy {}", file.display())));
    let envoy = envoy.transpose()?;
    let network = Network::create(args.dual_stack).context("make the mesh's network")?;
    let publishes = publishes(args, &input.documents, progress);
    let templates =
        inject::Files { inject: args.inject_config.clone(), values: args.inject_values.clone(), ..Default::default() };
    let plane = Plane::start(&network, &input.documents, &templates, &args.pilot_env)
        .await
        .context("start the control plane")?;
    let dialer = network.dialer();
    let sync = plane.sync_watch();
    let gateway = Gateway { dialer: dialer.clone(), tls: plane.gateway_tls() };
    // From the first packet on, so that no connection between pods is older than the tap.
    let tap = if args.check {
        Some(Tap::open(network.namespace(), check::APP_PORT).context("listen on the wire")?)
    } else {
        None
    };
    let mut documents = Plane::own_documents(&network);
    let dns_udp = network.listen_udp(53)?;
    let dns_tcp = network.listen(53)?;
    let outside_listener = network.listen(OUTSIDE_PORT)?;
    let upstream = dns::Upstream::from_resolv_conf(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    let listener = control::bind(&folder.socket()).context("listen on the control socket")?;

    let (mut cluster, remote, queue) = Cluster::new(Parts {
        folder: folder.clone(),
        network,
        plane,
        spawner,
        images: input.images,
        program: program()?,
        progress: progress.clone(),
        inject_undeclared: !args.no_default_injection,
        concurrency: args.concurrency,
        envoy,
    });
    // Services of `up` itself: they end with it, and a failure of one is said.
    let mut services: JoinSet<anyhow::Result<std::convert::Infallible>> = JoinSet::new();
    let zone = cluster.zone();
    services.spawn(async move { dns::serve(dns_udp, dns_tcp, zone, upstream).await.context("cluster DNS") });
    services.spawn(async move { outside::serve(outside_listener).await.context("the way outside") });
    let mut urls = Vec::new();
    for (publish, listener) in publishes {
        let namespace = publish.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let target = cluster.publish_target(&namespace, &publish.service, publish.port);
        let gateway = gateway.clone();
        urls.push((publish.service.clone(), publish.at));
        services.spawn(async move { publish::serve(listener, target, gateway).await.context("published port") });
    }
    let logs = folder.logs();
    services.spawn(async move { Ok(logs::rotate(logs).await) });
    let (info, info_reader) = watch::channel(Info { pid: std::process::id(), ..Info::default() });
    let (down, mut downed) = watch::channel(false);
    let (control_remote, control_sync) = (remote.clone(), sync.clone());
    services.spawn(async move { Ok(control::serve(listener, control_remote, control_sync, info_reader, down).await) });

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let cluster_task = tokio::spawn(cluster.run(queue));
    documents.extend(input.documents);
    let expects_pods = documents.iter().any(load::makes_pods);
    let (reply, applied) = oneshot::channel();
    remote.send(Command::Apply { documents, dry_run: false, reply }).await.map_err(anyhow::Error::msg)?;
    let applied = applied.await.context("the cluster ended at once")?;
    progress.step(&format!("{} applied", plural(applied.lines.len(), "object")));

    let serving = Serving {
        args,
        expects_pods,
        remote: &remote,
        dialer: &dialer,
        sync,
        tap: tap.as_ref(),
        info: &info,
        urls: &urls,
        progress,
    };
    let work = serving.run();
    let outcome = tokio::select! {
        outcome = work => outcome,
        _ = interrupt.recv() => Ok(ExitCode::SUCCESS),
        _ = terminate.recv() => Ok(ExitCode::SUCCESS),
        _ = downed.wait_for(|down| *down) => Ok(ExitCode::SUCCESS),
        Some(ended) = services.join_next() => match ended {
            Ok(Ok(never)) => match never {},
            Ok(Err(error)) => Err(error),
            Err(error) => Err(error.into()),
        },
    };
    progress.release();
    progress.step("ending");
    let _ = remote.send(Command::ShutDown).await;
    // A second Ctrl-C ends at once; the kernel then cleans up.
    tokio::select! {
        _ = cluster_task => {}
        _ = interrupt.recv() => {}
        () = tokio::time::sleep(Duration::from_secs(10)) => {}
    }
    outcome
}

/// A mesh that has been asked to start.
struct Serving<'a> {
    args: &'a UpArgs,
    /// Some object is a workload.
    expects_pods: bool,
    remote: &'a Remote,
    dialer: &'a Dialer,
    sync: SyncWatch,
    tap: Option<&'a Tap>,
    info: &'a watch::Sender<Info>,
    urls: &'a [(String, std::net::SocketAddr)],
    progress: &'a Progress,
}

impl Serving<'_> {
    /// Waits for the pods, tells the user, and goes on until cancelled (or until the smoke test has ended).
    async fn run(self) -> anyhow::Result<ExitCode> {
        let (args, progress) = (self.args, self.progress);
        let rows = wait_ready(self.remote, self.expects_pods, Duration::from_secs(args.timeout)).await?;
        let ready = rows.iter().filter(|row| row.settled).count();
        if rows.is_empty() {
            progress.warn("there is no pod to run: no Deployment, Pod or other workload is among the objects");
        } else if ready == rows.len() {
            progress.step(&format!("all {} pods ready", rows.len()));
        } else {
            progress
                .warn(&format!("{ready} of {} pods ready; `outrigger ps` says what the others wait for", rows.len()));
        }
        let mut shown = Vec::new();
        for (service, at) in self.urls {
            let is_page = service == "productpage";
            let url = format!("http://{}{}", display_address(*at), if is_page { "/productpage" } else { "/" });
            let served = if is_page && ready == rows.len() { self.first_page(*at).await } else { None };
            match served {
                Some(()) => progress.step(&format!(
                    "{url} served its first page {:.1} s after the start",
                    progress.elapsed().as_secs_f64()
                )),
                None => progress.step(&format!("{service} is published at {url}")),
            }
            shown.push(url);
        }
        // What follows is serving: the start's memory goes back.
        lifecycle::memory::release_unused();
        self.info.send_modify(|info| {
            info.settled = true;
            info.urls.clone_from(&shown);
        });
        if let Some(tap) = self.tap {
            let check = Check { remote: self.remote, dialer: self.dialer, sync: self.sync.clone(), tap, progress };
            let passed = check::run(check).await?;
            return Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        let table = async {
            if interactive() && !args.background {
                live::show(self.remote, self.dialer, &shown, progress).await
            } else {
                std::future::pending().await
            }
        };
        let watching = async {
            if args.watch {
                crate::watch::run(&args.paths, args.recursive, self.remote, progress).await
            } else {
                std::future::pending().await
            }
        };
        let never: anyhow::Result<std::convert::Infallible> = tokio::select! {
            ended = table => ended,
            ended = watching => ended,
        };
        match never? {}
    }

    /// Asks for the product page as a browser would, until it comes.
    async fn first_page(&self, at: std::net::SocketAddr) -> Option<()> {
        for _ in 0..100 {
            if page(at).await.is_some() {
                return Some(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        None
    }
}

/// One request for the product page over the published port; `None` unless it is served.
async fn page(at: std::net::SocketAddr) -> Option<()> {
    let stream = tokio::net::TcpStream::connect(at).await.ok()?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await.ok()?;
    let request = http::Request::get("/productpage")
        .header("host", at.to_string())
        .body(http_body_util::Empty::<hyper::body::Bytes>::new())
        .ok()?;
    let exchange = async {
        let response = sender.send_request(request).await.ok()?;
        response.status().is_success().then_some(())
    };
    tokio::select! {
        answer = exchange => answer,
        _ = connection => None,
    }
}

fn display_address(at: std::net::SocketAddr) -> String {
    if at.ip().is_loopback() { format!("localhost:{}", at.port()) } else { at.to_string() }
}

/// All pods, as soon as all are ready or the time is over.
async fn wait_ready(remote: &Remote, expects_pods: bool, patience: Duration) -> anyhow::Result<Vec<PodRow>> {
    let began = tokio::time::Instant::now();
    loop {
        let rows = rows(remote).await?;
        // Pods that cannot start need the user, not time.
        let hopeless =
            |row: &PodRow| matches!(row.status.as_str(), "ErrImagePull" | "Problem" | "CreateContainerConfigError");
        let complete = rows.iter().all(|row| row.settled || hopeless(row)) && (!rows.is_empty() || !expects_pods);
        if complete || began.elapsed() > patience {
            return Ok(rows);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What `ps` shows.
pub(crate) async fn rows(remote: &Remote) -> anyhow::Result<Vec<PodRow>> {
    let (reply, answer) = oneshot::channel();
    remote.send(Command::Ps { reply }).await.map_err(anyhow::Error::msg)?;
    answer.await.context("the mesh is ending")
}

/// Binds the published ports. One that is taken is said, and the rest runs on.
fn publishes(
    args: &UpArgs,
    documents: &[manifest::Document],
    progress: &Progress,
) -> Vec<(Publish, tokio::net::TcpListener)> {
    let mut wanted = args.publish.clone();
    let has_productpage = documents.iter().any(|d| d.kind() == "Service" && d.name() == "productpage");
    let is_published = wanted.iter().any(|publish| publish.service == "productpage");
    if has_productpage && !is_published {
        wanted.extend("productpage:9080=9080".parse::<Publish>());
    }
    let mut bound = Vec::new();
    for publish in wanted {
        let listener = std::net::TcpListener::bind(publish.at)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .and_then(tokio::net::TcpListener::from_std);
        match listener {
            Ok(listener) => bound.push((publish, listener)),
            Err(error) => progress.warn(&format!(
                "service {} is not published: {} {error}; choose another port with --publish {}:{}=PORT",
                publish.service, publish.at, publish.service, publish.port
            )),
        }
    }
    bound
}

/// The path of this program, to be mounted into containers.
fn program() -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe().context("find this program")?;
    if !path.exists() {
        bail!("{} is gone; was it rebuilt meanwhile?", path.display());
    }
    Ok(path)
}

/// Whether a live table can be shown.
pub(crate) fn interactive() -> bool {
    std::io::stderr().is_terminal() && std::io::stdout().is_terminal()
}
