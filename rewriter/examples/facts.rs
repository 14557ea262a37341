//! Prints what is known of every value of each model named on the command line before it runs: one JSON object per model, a value's
//! element type, sizes (null: open) and elements by its name. `tests/python/test_operators.py` compares that with what operators give.

use ditfastattn_rewriter::onnx::ModelFile;
use ditfastattn_rewriter::shapes::{Dim, Value, infer};
use serde_json::{Map, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        let model = ModelFile::open(path.as_ref())?;
        let facts = infer(&model.graph, None);
        let nodes = model.graph.nodes.iter();
        let mut values = Map::new();
        for name in nodes
            .flat_map(|n| &n.proto.output)
            .filter(|n| !n.is_empty())
        {
            let fact = facts.of(name);
            let sizes = |dims: &Vec<Dim>| dims.iter().map(Dim::known).collect::<Vec<_>>();
            let elements = match &fact.value {
                Some(Value::Ints(v)) => json!(sizes(v)),
                Some(Value::Floats(v)) => json!(v),
                None => json!(null),
            };
            let shape = fact.shape.as_ref().map(sizes);
            values.insert(
                name.clone(),
                json!({"type": fact.elem_type, "shape": shape, "elements": elements}),
            );
        }
        println!("{}", serde_json::Value::Object(values));
    }
    Ok(())
}
