//! Everything here happens in fresh, unnamed namespaces; the host's own is never touched.

mod links;
mod nft;

use netns::Netns;

/// A fresh namespace with loopback up, or a visible reason why the test does not run.
fn fresh() -> Option<Netns> {
    match Netns::create() {
        Ok(ns) => {
            netns::Netlink::open_in(&ns).and_then(|mut n| n.loopback_up()).expect("loopback up");
            Some(ns)
        }
        Err(e) => {
            println!("SKIPPED: network namespaces need root: {e}");
            None
        }
    }
}

/// The output of a program run in a namespace.
fn output(ns: &Netns, program: &str, args: &[&str]) -> String {
    let out = ns.run(|| std::process::Command::new(program).args(args).output()).expect("enter");
    let out = out.unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("UTF-8")
}
