//! `up --detach`: the same `up` in the background, its progress shown until it is settled.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::args::UpArgs;
use crate::client::ask;
use crate::control::{Request, Response};
use crate::folder::{Error, Folder};

/// Starts the background process and follows it until it is settled or has failed.
pub(crate) fn run(args: &UpArgs, folder: &Folder) -> anyhow::Result<ExitCode> {
    if folder.is_running()? {
        return Err(Error::Running(args.mesh.name.clone()).into());
    }
    folder.remove_stale()?;
    let path = folder.own_log();
    let parent = path.parent().context("the state folder has no parent")?;
    fs::DirBuilder::new().recursive(true).create(parent).with_context(|| parent.display().to_string())?;
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    let mut child = Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .arg("--background")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("start the background process")?;
    let mut shown = 0;
    loop {
        let status = child.try_wait()?;
        shown = show_more(&path, shown);
        if let Some(status) = status {
            let _ = fs::remove_file(&path);
            bail!("the mesh ended: {status}");
        }
        if let Ok(Response::Info(info)) = ask(folder, &Request::Info)
            && info.settled
        {
            show_more(&path, shown);
            let down = match folder.name() {
                "default" => "outrigger down".to_owned(),
                name => format!("outrigger down --name {name}"),
            };
            eprintln!("the mesh runs in the background; `{down}` ends it");
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn show_more(path: &std::path::Path, from: u64) -> u64 {
    let mut text = Vec::new();
    let read = fs::File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(from))?;
        file.read_to_end(&mut text)
    });
    if read.is_ok() {
        let _ = std::io::stderr().write_all(&text);
    }
    from + text.len() as u64
}
