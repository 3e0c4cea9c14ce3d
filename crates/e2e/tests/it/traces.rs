use e2e::{HostState, Mesh, Output, can_run_meshes, outrigger};

#[test]
fn a_killed_mesh_leaves_nothing() {
    if !can_run_meshes("a_killed_mesh_leaves_nothing") {
        return;
    }
    let before = HostState::read("e2e-traces");
    for ending in ["down", "kill, then down", "kill, then up and down"] {
        let mut mesh = Mesh::up("e2e-traces", &["samples/bookinfo", "--publish", "productpage:9080=19186"]).unwrap();
        if ending != "down" {
            mesh.kill();
        }
        if ending.contains("then up") {
            let again = Mesh::up("e2e-traces", &["samples/bookinfo", "--publish", "productpage:9080=19186"]).unwrap();
            drop(again);
        }
        drop(mesh);
        let output = Output::of(outrigger().args(["down", "--name", "e2e-traces"]));
        assert!(output.success, "{}", output.all());
        assert_eq!(before, HostState::read("e2e-traces"), "after {ending}");
    }
}
