use ditfastattn_rewriter::onnx::ModelFile;
use ditfastattn_rewriter::shapes::infer;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let m = ModelFile::open(a[1].as_ref()).unwrap();
    let f = infer(&m.graph, Some(&a[2]));
    for (i, n) in m.graph.nodes.iter().enumerate() {
        if n.label().contains(&a[3]) {
            println!(
                "{} {} {:?} -> {} {} bound {} free {:?} val {:?}",
                i,
                n.op(),
                n.proto.input.iter().map(|i| f.show(i)).collect::<Vec<_>>(),
                n.label(),
                f.show(n.output(0)),
                f.binds_batch(i),
                f.batch_free_target(i),
                f.of(n.output(0)).value
            );
        }
    }
}
