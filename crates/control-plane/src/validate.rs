//! `outrigger validate`: says what istiod would refuse or warn of, without a mesh.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use config_store::{Kind, Object};

/// Check Kubernetes and Istio YAML as the control plane would.
#[derive(Clone, Debug, Parser)]
pub struct ValidateArgs {
    /// Files and folders; `-` is standard input.
    #[arg(short = 'f', long = "filename", value_name = "PATH", required = true)]
    files: Vec<PathBuf>,
}

/// Prints every fault with file, line and field; fails when there is one. Warnings are printed and do no harm.
///
/// # Errors
/// Never; what cannot be read is a fault like any other.
pub fn validate(args: ValidateArgs) -> anyhow::Result<ExitCode> {
    let (documents, unreadable) = manifest::read(&args.files);
    let (mut errors, mut warnings, mut checked) = (0, 0, 0);
    for error in unreadable {
        errors += 1;
        eprintln!("error: {error}");
    }
    for document in &documents {
        // A kind that Istio's groups do not have is a misspelt one; those of others are nobody's business here.
        let is_istio = Kind::ALL.iter().any(|kind| kind.is_istio() && kind.group() == document.group());
        if Kind::of(document.group(), document.kind()).is_none() && !is_istio {
            continue;
        }
        checked += 1;
        match Object::read(document) {
            Ok((object, found)) => {
                warnings += found.len();
                for warning in found {
                    eprintln!("warning: {}: {warning}", object.key);
                }
            }
            Err(rejected) => {
                errors += rejected.errors.len();
                for line in rejected.to_string().lines() {
                    eprintln!("error: {line}");
                }
            }
        }
    }
    let skipped = documents.len() - checked;
    println!("{checked} objects checked, {skipped} of other kinds skipped: {errors} errors, {warnings} warnings");
    Ok(if errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `outrigger crds`: writes the CustomResourceDefinitions of Istio's kinds.
///
/// # Errors
/// When nobody takes the output.
pub fn crds() -> anyhow::Result<ExitCode> {
    std::io::stdout().write_all(kube_source::crds().as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
