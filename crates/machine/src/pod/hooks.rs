//! postStart and preStop hooks, and programs run inside a container on the pod's behalf.

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Probe};

use super::Shared;
use crate::container::Running;
use crate::container::enter::Enter;

impl Shared {
    /// Runs a hook to its end.
    pub(super) async fn hook(&self, container: &Container, handler: &LifecycleHandler) -> Result<(), String> {
        if let Some(exec) = &handler.exec {
            return self.exec(container, exec.command.as_deref().unwrap_or_default()).await;
        }
        if let Some(get) = &handler.http_get {
            return self.asker.http_get(container, get).await;
        }
        if let Some(sleep) = &handler.sleep {
            tokio::time::sleep(std::time::Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        }
        Ok(())
    }

    /// Asks a probe's question once.
    pub(super) async fn probe(&self, container: &Container, probe: &Probe) -> Result<(), String> {
        match &probe.exec {
            Some(exec) => {
                let limit = super::probe::Timing::of(probe).timeout;
                tokio::time::timeout(limit, self.exec(container, exec.command.as_deref().unwrap_or_default()))
                    .await
                    .map_err(|_| format!("no answer within {} s", limit.as_secs()))?
            }
            None => self.asker.ask(container, probe).await,
        }
    }

    async fn exec(&self, container: &Container, command: &[String]) -> Result<(), String> {
        let enter = self.enter(&container.name).ok_or("the container is not running")?;
        let output = rustix::fs::open(
            "/dev/null",
            rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .map_err(|error| error.to_string())?;
        let program = command.join(" ");
        let running = self
            .spawner
            .exec(Enter { argv: command.to_vec(), ..enter }, output)
            .await
            .map_err(|error| format!("{program}: {error}"))?;
        let running = KillOnDrop(running);
        match running.0.wait().await.map_err(|error| format!("{program}: {error}"))?.code() {
            0 => Ok(()),
            code => Err(format!("{program}: exit code {code}")),
        }
    }

    fn enter(&self, name: &str) -> Option<Enter> {
        super::lock(&self.state).containers.iter().find(|c| c.name == name).and_then(|c| c.enter.clone())
    }
}

/// A probe that took too long is killed and collected, not left running.
struct KillOnDrop(Running);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.kill_and_forget();
    }
}
