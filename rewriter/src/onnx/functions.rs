//! Model-local functions, put in place of their calls: what finds attention looks at one graph only.
//!
//! A node whose domain, operator and overload name a function becomes the function's nodes. Their values and names get the call's
//! name in front, references to the function's attributes become the call's attributes or the defaults. Functions that nothing
//! calls stay as they are, and a model without calls is not touched.

use super::graph::MAX_SUBGRAPH_DEPTH;
use super::graph::{FIELD_INITIALIZER, FIELD_INPUT, FIELD_NODE, FIELD_OUTPUT, FIELD_VALUE_INFO};
use super::proto::{NodeProto, OperatorSetIdProto};
use super::walk::{self, split, text, texts};
use super::wire::{self, Field};
use bytes::Bytes;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;

pub const MODEL_GRAPH: u32 = 7;
const MODEL_OPSET_IMPORT: u32 = 8;
pub const MODEL_FUNCTIONS: u32 = 25;
const FUNCTION_NAME: u32 = 1;
const FUNCTION_INPUT: u32 = 4;
const FUNCTION_OUTPUT: u32 = 5;
const FUNCTION_OPSET_IMPORT: u32 = 9;
const FUNCTION_DOMAIN: u32 = 10;
const FUNCTION_DEFAULT: u32 = 11;
const FUNCTION_OVERLOAD: u32 = 13;
const ATTRIBUTE_REFERENCE: u32 = 21;
const GRAPH_SPARSE_INITIALIZER: u32 = 15;
const TENSOR_NAME: u32 = 8;
/// `name` of a `ValueInfoProto`.
const VALUE_NAME: u32 = 1;

/// What functions grow to, at most: this many times the file and a constant. Calls of calls of calls multiply, and a node takes ten
/// times its bytes once it is read.
const MAX_GROWTH: usize = 4;
const MAX_BYTES: usize = 1 << 23;

/// Longer names of calls are cut where they become a part of other names.
const MAX_PREFIX: usize = 200;

/// Domain, operator, overload.
type Id = (String, String, String);

/// A function that is called, opened up.
struct Function {
    inputs: Vec<String>,
    outputs: Vec<String>,
    defaults: HashMap<String, Bytes>,
    imports: BTreeMap<String, i64>,
    nodes: Vec<Bytes>,
}

/// The fields of the model with every call in its graph replaced; `None` if there is none.
///
/// # Errors
/// A function that calls itself, that asks for other versions of operators than the model, that does not fit its call, or that
/// would make the model many times as large.
pub fn inline(model: &[Field]) -> Result<Option<Vec<Field>>, String> {
    let mut bodies: HashMap<Id, Bytes> = HashMap::new();
    for function in model.iter().filter_map(|f| f.message(MODEL_FUNCTIONS)) {
        bodies.insert(id_of(&split(function)?), function.clone());
    }
    let Some(graph) = model.iter().find_map(|f| f.message(MODEL_GRAPH)) else {
        return Ok(None);
    };
    if bodies.is_empty() || !calls(graph, FIELD_NODE, &bodies)? {
        return Ok(None);
    }
    let mut imports = BTreeMap::new();
    for import in model.iter().filter_map(|f| f.message(MODEL_OPSET_IMPORT)) {
        let import = OperatorSetIdProto::decode(import.clone()).map_err(|e| e.to_string())?;
        imports.insert(walk::domain(import.domain), import.version);
    }
    let size: usize = model.iter().map(|f| f.raw.len()).sum();
    let mut inliner = Inliner {
        bodies: &bodies,
        open: HashMap::new(),
        names: BTreeSet::new(),
        prefixes: HashMap::new(),
        room: size.saturating_mul(MAX_GROWTH).saturating_add(MAX_BYTES),
        imports,
        added: Vec::new(),
    };
    inliner.take_names(graph)?;
    let graph = inliner.graph(graph, 0, &mut Vec::new())?;
    let kept = kept(&bodies, &inliner)?;
    let added = inliner.added;
    let mut fields = Vec::new();
    for field in model {
        if field.message(MODEL_GRAPH).is_some() {
            fields.push(message(MODEL_GRAPH, &graph));
        } else if let Some(function) = field.message(MODEL_FUNCTIONS) {
            if kept.contains(&id_of(&split(function)?)) {
                fields.push(field.clone());
            }
        } else {
            fields.push(field.clone());
        }
    }
    for (domain, version) in added {
        let import = OperatorSetIdProto { domain, version }.encode_to_vec();
        fields.push(message(MODEL_OPSET_IMPORT, &import.into()));
    }
    Ok(Some(fields))
}

/// Functions that the graph never called, and what those call.
fn kept(bodies: &HashMap<Id, Bytes>, inliner: &Inliner) -> Result<HashSet<Id>, String> {
    let unused = bodies.keys().filter(|id| !inliner.open.contains_key(*id));
    let mut pending: Vec<Id> = unused.cloned().collect();
    let mut kept: HashSet<Id> = pending.iter().cloned().collect();
    while let Some(id) = pending.pop() {
        walk::nodes(&bodies[&id], walk::FUNCTION_NODE, 0, &mut |node| {
            let called = called(node);
            if bodies.contains_key(&called) && kept.insert(called.clone()) {
                pending.push(called);
            }
            true
        })?;
    }
    Ok(kept)
}

fn id_of(function: &[Field]) -> Id {
    (
        walk::domain(text(function, FUNCTION_DOMAIN)),
        text(function, FUNCTION_NAME),
        text(function, FUNCTION_OVERLOAD),
    )
}

/// The function that `node` would be a call of.
fn called(node: &[Field]) -> Id {
    (
        walk::domain(text(node, walk::NODE_DOMAIN)),
        text(node, walk::NODE_OP),
        text(node, walk::NODE_OVERLOAD),
    )
}

fn calls(message: &Bytes, number: u32, bodies: &HashMap<Id, Bytes>) -> Result<bool, String> {
    let none = &mut |node: &[Field]| !bodies.contains_key(&called(node));
    Ok(!walk::nodes(message, number, 0, none)?)
}

fn message(number: u32, payload: &Bytes) -> Field {
    let mut raw = wire::header(number, payload.len());
    let start = raw.len();
    raw.extend(payload);
    let raw = Bytes::from(raw);
    Field {
        number,
        payload: Some(raw.slice(start..)),
        raw,
        varint: None,
    }
}

fn put(out: &mut Vec<u8>, number: u32, payload: &[u8]) {
    out.extend(wire::header(number, payload.len()));
    out.extend(payload);
}

/// How messages call a function.
fn shown(id: &Id) -> String {
    let overload = if id.2.is_empty() { "" } else { ":" };
    let name: String = format!("{}.{}{overload}{}", id.0, id.1, id.2);
    name.chars()
        .take(80)
        .collect::<String>()
        .escape_default()
        .to_string()
}

struct Inliner<'m> {
    bodies: &'m HashMap<Id, Bytes>,
    /// Those that were called.
    open: HashMap<Id, Rc<Function>>,
    /// Every name of the model so far.
    names: BTreeSet<String>,
    /// How often a prefix was asked for.
    prefixes: HashMap<String, usize>,
    /// Bytes that may still be added.
    room: usize,
    imports: BTreeMap<String, i64>,
    added: Vec<(String, i64)>,
}

/// What the names of a function's body become.
struct Scope<'c> {
    map: HashMap<String, String>,
    prefix: String,
    function: &'c Function,
    /// The call's attributes.
    given: HashMap<String, Bytes>,
}

impl Scope<'_> {
    fn name(&self, name: &str) -> String {
        match self.map.get(name) {
            _ if name.is_empty() => String::new(),
            Some(outer) => outer.clone(),
            None => format!("{}{name}", self.prefix),
        }
    }
}

impl Inliner<'_> {
    fn take_names(&mut self, graph: &Bytes) -> Result<(), String> {
        let mut pending = vec![graph.clone()];
        // How deep they are nested is limited by `walk::nodes`, which has seen the same graphs.
        while let Some(graph) = pending.pop() {
            for field in split(&graph)? {
                let Some(payload) = &field.payload else {
                    continue;
                };
                match field.number {
                    FIELD_NODE => {
                        let node = split(payload)?;
                        self.names.insert(text(&node, walk::NODE_NAME));
                        self.names.extend(texts(&node, walk::NODE_OUTPUT));
                        pending.extend(walk::subgraphs(&node)?);
                    }
                    FIELD_INITIALIZER => {
                        self.names.insert(text(&split(payload)?, TENSOR_NAME));
                    }
                    FIELD_INPUT | FIELD_OUTPUT | FIELD_VALUE_INFO => {
                        self.names.insert(text(&split(payload)?, VALUE_NAME));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// A prefix that no name of the model begins with.
    fn prefix(&mut self, label: &str) -> String {
        let label: String = label.chars().take(MAX_PREFIX).collect();
        loop {
            let count = self.prefixes.entry(label.clone()).or_default();
            let prefix = match *count {
                0 => format!("{label}/"),
                n => format!("{label}_{n}/"),
            };
            *count += 1;
            let next = self.names.range(prefix.clone()..).next();
            if !next.is_some_and(|name| name.starts_with(&prefix)) {
                return prefix;
            }
        }
    }

    fn spend(&mut self, bytes: usize) -> Result<(), String> {
        self.room = self.room.checked_sub(bytes).ok_or_else(|| {
            format!(
                "its functions grow to more than {MAX_GROWTH} times the file and {MAX_BYTES} bytes where they are put in place of their calls"
            )
        })?;
        Ok(())
    }

    /// `graph` without calls.
    fn graph(&mut self, graph: &Bytes, depth: usize, stack: &mut Vec<Id>) -> Result<Bytes, String> {
        if depth > MAX_SUBGRAPH_DEPTH {
            return Err(format!(
                "subgraphs are nested more than {MAX_SUBGRAPH_DEPTH} deep"
            ));
        }
        let mut out = Vec::with_capacity(graph.len());
        for field in split(graph)? {
            match field.message(FIELD_NODE) {
                Some(node) => self.node(node, depth, stack, &mut out)?,
                None => out.extend(&field.raw),
            }
        }
        Ok(out.into())
    }

    /// `raw`, or what it calls.
    fn node(
        &mut self,
        raw: &Bytes,
        depth: usize,
        stack: &mut Vec<Id>,
        out: &mut Vec<u8>,
    ) -> Result<(), String> {
        let fields = split(raw)?;
        let id = called(&fields);
        if self.bodies.contains_key(&id) {
            return self.call(&fields, id, depth, stack, out);
        }
        let mut inner = false;
        for graph in walk::subgraphs(&fields)? {
            inner |= calls(&graph, FIELD_NODE, self.bodies)?;
        }
        if !inner {
            put(out, FIELD_NODE, raw);
            return Ok(());
        }
        let mut node = Vec::new();
        for field in &fields {
            let Some(attribute) = field.message(walk::NODE_ATTRIBUTE) else {
                node.extend(&field.raw);
                continue;
            };
            let mut changed = Vec::new();
            for field in split(attribute)? {
                match &field.payload {
                    Some(graph) if is_graph(&field) => {
                        let graph = self.graph(graph, depth + 1, stack)?;
                        put(&mut changed, field.number, &graph);
                    }
                    _ => changed.extend(&field.raw),
                }
            }
            put(&mut node, walk::NODE_ATTRIBUTE, &changed);
        }
        put(out, FIELD_NODE, &node);
        Ok(())
    }

    fn call(
        &mut self,
        call: &[Field],
        id: Id,
        depth: usize,
        stack: &mut Vec<Id>,
        out: &mut Vec<u8>,
    ) -> Result<(), String> {
        if stack.contains(&id) {
            return Err(format!("the function {} calls itself", shown(&id)));
        }
        if stack.len() >= MAX_SUBGRAPH_DEPTH {
            return Err(format!(
                "functions call each other more than {MAX_SUBGRAPH_DEPTH} deep"
            ));
        }
        let function = self.function(&id)?;
        let (inputs, outputs) = (
            texts(call, walk::NODE_INPUT),
            texts(call, walk::NODE_OUTPUT),
        );
        for (what, given, has) in [
            ("inputs", inputs.len(), function.inputs.len()),
            ("outputs", outputs.len(), function.outputs.len()),
        ] {
            if given > has {
                return Err(format!(
                    "the function {} is called with {given} {what}, it has {has}",
                    shown(&id)
                ));
            }
        }
        let label = match text(call, walk::NODE_NAME) {
            name if name.is_empty() => id.1.clone(),
            name => name,
        };
        let mut scope = Scope {
            map: HashMap::new(),
            prefix: self.prefix(&label),
            function: &function,
            given: HashMap::new(),
        };
        for attribute in call.iter().filter_map(|f| f.message(walk::NODE_ATTRIBUTE)) {
            let name = text(&split(attribute)?, walk::ATTRIBUTE_NAME);
            scope.given.insert(name, attribute.clone());
        }
        for (i, formal) in function.inputs.iter().enumerate() {
            let actual = inputs.get(i).cloned().unwrap_or_default();
            scope.map.insert(formal.clone(), actual);
        }
        // An output that is an input, or an output twice.
        let mut copies = Vec::new();
        for (formal, actual) in function.outputs.iter().zip(&outputs) {
            if actual.is_empty() {
                continue;
            }
            match scope.map.get(formal) {
                Some(known) if known.is_empty() => {
                    return Err(format!(
                        "the function {} returns its input `{formal}`, which a call leaves out",
                        shown(&id)
                    ));
                }
                Some(known) => copies.push((known.clone(), actual.clone())),
                None => {
                    scope.map.insert(formal.clone(), actual.clone());
                }
            }
        }
        let mut nodes = Vec::new();
        for node in &function.nodes {
            let node = self.renamed_node(node, &scope, 0)?;
            self.spend(node.len())?;
            nodes.push(node);
        }
        for (from, to) in copies {
            let copy = NodeProto {
                input: vec![from],
                name: Some(format!("{}{}", scope.prefix, to)),
                output: vec![to],
                op_type: Some("Identity".into()),
                ..NodeProto::default()
            };
            nodes.push(copy.encode_to_vec().into());
        }
        stack.push(id);
        for node in &nodes {
            self.node(node, depth, stack, out)?;
        }
        stack.pop();
        Ok(())
    }

    /// The function called `id`, whose operators then are the model's.
    fn function(&mut self, id: &Id) -> Result<Rc<Function>, String> {
        if let Some(function) = self.open.get(id) {
            return Ok(Rc::clone(function));
        }
        let body = &self.bodies[id];
        let function = Function::read(id, body)?;
        let mut used = BTreeSet::new();
        walk::nodes(body, walk::FUNCTION_NODE, 0, &mut |node| {
            let called = called(node);
            if !self.bodies.contains_key(&called) {
                used.insert(called.0);
            }
            true
        })?;
        for domain in used {
            let Some(&wanted) = function.imports.get(&domain) else {
                continue;
            };
            match self.imports.get(&domain) {
                Some(&has) if has != wanted => {
                    let domain = if domain.is_empty() {
                        "ai.onnx"
                    } else {
                        &domain
                    };
                    return Err(format!(
                        "the function {} uses version {wanted} of the operators of {domain}, the model version {has}; expected the same: convert the model to one version",
                        shown(id)
                    ));
                }
                Some(_) => {}
                None => {
                    self.imports.insert(domain.clone(), wanted);
                    self.added.push((domain, wanted));
                }
            }
        }
        let function = Rc::new(function);
        self.open.insert(id.clone(), Rc::clone(&function));
        Ok(function)
    }

    fn renamed(&mut self, name: &[u8], scope: &Scope) -> String {
        let name = scope.name(&String::from_utf8_lossy(name));
        self.names.insert(name.clone());
        name
    }

    /// A node of a function's body with the call's names and attributes.
    fn renamed_node(&mut self, raw: &Bytes, scope: &Scope, depth: usize) -> Result<Bytes, String> {
        let mut node = Vec::with_capacity(raw.len());
        for field in split(raw)? {
            match (field.number, &field.payload) {
                (walk::NODE_INPUT | walk::NODE_OUTPUT, Some(name)) => {
                    put(
                        &mut node,
                        field.number,
                        self.renamed(name, scope).as_bytes(),
                    );
                }
                (walk::NODE_NAME, Some(name)) if !name.is_empty() => {
                    let name = format!("{}{}", scope.prefix, String::from_utf8_lossy(name));
                    put(&mut node, walk::NODE_NAME, name.as_bytes());
                    self.names.insert(name);
                }
                (walk::NODE_ATTRIBUTE, Some(attribute)) => {
                    if let Some(attribute) = self.resolved(attribute, scope, depth)? {
                        put(&mut node, walk::NODE_ATTRIBUTE, &attribute);
                    }
                }
                _ => node.extend(&field.raw),
            }
        }
        Ok(node.into())
    }

    /// An attribute of a node of a function's body; `None` if it refers to one that neither the call nor the function has.
    fn resolved(
        &mut self,
        attribute: &Bytes,
        scope: &Scope,
        depth: usize,
    ) -> Result<Option<Bytes>, String> {
        let fields = split(attribute)?;
        let reference = text(&fields, ATTRIBUTE_REFERENCE);
        let mut out = Vec::with_capacity(attribute.len());
        if !reference.is_empty() {
            let given = scope.given.get(&reference);
            let Some(found) = given.or_else(|| scope.function.defaults.get(&reference)) else {
                return Ok(None);
            };
            let name = text(&fields, walk::ATTRIBUTE_NAME);
            put(&mut out, walk::ATTRIBUTE_NAME, name.as_bytes());
            // The value is the caller's: names in it are not the function's.
            let value = split(found)?;
            let value = value.iter().filter(|f| f.number != walk::ATTRIBUTE_NAME);
            value.for_each(|f| out.extend(&f.raw));
            return Ok(Some(out.into()));
        }
        for field in &fields {
            match &field.payload {
                Some(graph) if is_graph(field) => {
                    let graph = self.renamed_graph(graph, scope, depth + 1)?;
                    put(&mut out, field.number, &graph);
                }
                _ => out.extend(&field.raw),
            }
        }
        Ok(Some(out.into()))
    }

    fn renamed_graph(
        &mut self,
        graph: &Bytes,
        scope: &Scope,
        depth: usize,
    ) -> Result<Bytes, String> {
        if depth > MAX_SUBGRAPH_DEPTH {
            return Err(format!(
                "subgraphs are nested more than {MAX_SUBGRAPH_DEPTH} deep"
            ));
        }
        let mut out = Vec::with_capacity(graph.len());
        for field in split(graph)? {
            let Some(payload) = &field.payload else {
                out.extend(&field.raw);
                continue;
            };
            let named = match field.number {
                FIELD_NODE => {
                    let node = self.renamed_node(payload, scope, depth)?;
                    put(&mut out, FIELD_NODE, &node);
                    continue;
                }
                FIELD_INITIALIZER => TENSOR_NAME,
                FIELD_INPUT | FIELD_OUTPUT | FIELD_VALUE_INFO => VALUE_NAME,
                GRAPH_SPARSE_INITIALIZER => {
                    return Err(
                        "a subgraph of a function has sparse initializers, which is not supported"
                            .into(),
                    );
                }
                _ => {
                    out.extend(&field.raw);
                    continue;
                }
            };
            let mut element = Vec::with_capacity(payload.len());
            for part in split(payload)? {
                match part.message(named) {
                    Some(name) => {
                        let name = self.renamed(name, scope);
                        put(&mut element, named, name.as_bytes());
                    }
                    None => element.extend(&part.raw),
                }
            }
            put(&mut out, field.number, &element);
        }
        Ok(out.into())
    }
}

fn is_graph(attribute: &Field) -> bool {
    matches!(
        attribute.number,
        walk::ATTRIBUTE_GRAPH | walk::ATTRIBUTE_GRAPHS
    )
}

impl Function {
    fn read(id: &Id, body: &Bytes) -> Result<Self, String> {
        let fields = split(body)?;
        let messages = |number: u32| fields.iter().filter_map(move |f| f.message(number));
        let mut imports = BTreeMap::new();
        for import in messages(FUNCTION_OPSET_IMPORT) {
            let import = OperatorSetIdProto::decode(import.clone()).map_err(|e| e.to_string())?;
            imports.insert(walk::domain(import.domain), import.version);
        }
        let mut defaults = HashMap::new();
        for default in messages(FUNCTION_DEFAULT) {
            let name = text(&split(default)?, walk::ATTRIBUTE_NAME);
            defaults.insert(name, default.clone());
        }
        let function = Self {
            inputs: texts(&fields, FUNCTION_INPUT),
            outputs: texts(&fields, FUNCTION_OUTPUT),
            defaults,
            imports,
            nodes: messages(walk::FUNCTION_NODE).cloned().collect(),
        };
        let mut defined: HashSet<String> = function.inputs.iter().cloned().collect();
        let inputs = defined.len();
        for node in &function.nodes {
            for output in texts(&split(node)?, walk::NODE_OUTPUT) {
                if !output.is_empty() && !defined.insert(output.clone()) {
                    return Err(format!(
                        "the function {} produces `{output}` twice",
                        shown(id)
                    ));
                }
            }
        }
        if inputs < function.inputs.len() {
            return Err(format!("the function {} has an input twice", shown(id)));
        }
        match function.outputs.iter().find(|o| !defined.contains(*o)) {
            Some(output) => Err(format!(
                "the function {} does not produce its output `{output}`",
                shown(id)
            )),
            None => Ok(function),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::onnx::testing::bytes;
    use crate::onnx::{GraphEdit, ModelFile, Node};
    use std::path::Path;

    fn parsed(text: &str) -> Result<ModelFile, String> {
        ModelFile::parse(Path::new("model.onnx"), bytes(text).into()).map_err(|e| e.to_string())
    }

    /// `out = op(in) attributes` of every node.
    fn shown(nodes: &[Node]) -> Vec<String> {
        let one = |n: &Node| {
            let ints: Vec<_> = n.attributes().iter().map(|a| a.i.unwrap_or(0)).collect();
            let (outputs, inputs) = (n.proto.output.join(","), n.proto.input.join(","));
            format!("{outputs} = {}({inputs}) {ints:?}", n.op())
        };
        nodes.iter().map(one).collect()
    }

    const AROUND: &str = "opset 17
        opset my 1
        input x float [4]
        output y float [4]";

    #[test]
    fn a_call_becomes_the_functions_nodes() {
        let model = parsed(&format!(
            "function my Outer (a, b, c) (r, a) axis, far=7
             u = my::Inner(a, c)
             v = Softmax(u) axis=$axis
             r = Clip(v, b) axis=$far other=$none
             end
             function my Inner (a, c) (r)
             r = Concat(a, c)
             end
             function my Never (a) (r)
             r = my::Inner(a)
             end
             {AROUND}
             y, z = my::Outer(x, _, x) axis=3
             w = my::Outer(z) axis=4 far=5"
        ))
        .unwrap();
        assert!(model.inlined);
        assert_eq!(
            shown(&model.graph.nodes),
            [
                "node_y/u = Concat(x,x) []",
                "node_y/v = Softmax(node_y/u) [3]",
                "y = Clip(node_y/v,) [7]",
                "z = Identity(x) []",
                "node_w/u = Concat(z,) []",
                "node_w/v = Softmax(node_w/u) [4]",
                "w = Clip(node_w/v,) [5]",
            ]
        );
        // What nothing calls is kept, with what it calls; written and read again the model is the same.
        let written = model.serialize(&GraphEdit::default(), None, &[]).concat();
        let again = ModelFile::parse(Path::new("model.onnx"), written.into()).unwrap();
        assert!(!again.inlined);
        assert_eq!(shown(&again.graph.nodes), shown(&model.graph.nodes));
        let functions = again.fields().iter().filter(|f| f.number == 25);
        assert_eq!(functions.count(), 2);
    }

    #[test]
    fn names_reach_into_subgraphs_and_calls_out_of_them() {
        let model = parsed(&format!(
            "graph inner
             b = Add(a, kept)
             output b
             end
             graph outer
             c = my::F(x)
             output c
             end
             function my F (a) (r)
             kept = Abs(a)
             r = If(a) then_branch=@inner
             end
             {AROUND}
             y = If(x) then_branch=@outer"
        ))
        .unwrap();
        let outer = model.graph.nodes[0].inner();
        assert_eq!(shown(&outer), ["node_c/kept = Abs(x) []", "c = If(x) [0]"]);
        let inner = outer[1].inner();
        assert_eq!(shown(&inner), ["node_c/b = Add(x,node_c/kept) []"]);
    }

    #[test]
    fn names_that_are_taken_are_not_given_again() {
        let model = parsed(&format!(
            "function my F (a) (r)
             u = Abs(a)
             r = Neg(u)
             end
             {AROUND}
             node_y/u = Relu(x)
             y = my::F(node_y/u)"
        ))
        .unwrap();
        assert_eq!(model.graph.nodes[1].output(0), "node_y_1/u");
    }

    #[test]
    fn what_cannot_be_put_in_place_is_refused() {
        let loops = "function my F (a) (r)
             r = my::G(a)
             end
             function my G (a) (r)
             r = my::F(a)
             end";
        let other_version = "function my F (a) (r)
             opset 13
             r = Softmax(a)
             end";
        let nothing = "function my F (a) (r)
             s = Abs(a)
             end";
        let twice = "function my F (a) (r)
             r = Abs(a)
             r = Neg(a)
             end";
        for (function, words) in [
            (loops, &["my.F", "calls itself"][..]),
            (
                other_version,
                &["my.F", "version 13", "ai.onnx", "version 17"],
            ),
            (nothing, &["my.F", "does not produce its output `r`"]),
            (twice, &["my.F", "produces `r` twice"]),
        ] {
            let error = parsed(&format!("{function}\n{AROUND}\ny = my::F(x)"))
                .err()
                .unwrap();
            assert!(words.iter().all(|w| error.contains(w)), "{error}");
        }
        let call = "function my F (a) (r)\nr = Abs(a)\nend";
        let error = parsed(&format!("{call}\n{AROUND}\ny = my::F(x, x)"))
            .err()
            .unwrap();
        assert!(error.contains("called with 2 inputs, it has 1"), "{error}");
        // What nothing calls is nobody's concern.
        assert!(
            !parsed(&format!("{loops}\n{AROUND}\ny = Abs(x)"))
                .unwrap()
                .inlined
        );
    }

    #[test]
    fn a_version_that_no_operator_needs_is_no_conflict_and_a_new_domain_is_imported() {
        let model = parsed(&format!(
            "function my F (a) (r)
             opset 13
             opset com.microsoft 1
             r = com.microsoft::Gelu(a)
             end
             {AROUND}
             y = my::F(x)"
        ))
        .unwrap();
        assert!(model.opset_imports.contains(&("com.microsoft".into(), 1)));
        assert_eq!(model.onnx_opset(), 17);
    }

    #[test]
    fn functions_that_multiply_are_refused() {
        let mut text = String::from("function my F0 (a) (r)\nr = Abs(a)\nend\n");
        for i in 1..30 {
            text += &format!(
                "function my F{i} (a) (r)\nu = my::F{0}(a)\nr = my::F{0}(u)\nend\n",
                i - 1
            );
        }
        let error = parsed(&format!("{text}{AROUND}\ny = my::F29(x)"))
            .err()
            .unwrap();
        assert!(error.contains("grow"), "{error}");
    }

    #[test]
    fn damaged_functions_are_refused_or_read_and_never_a_panic() {
        use ditfastattn_fuzz::damage::Damage;
        let whole = bytes(&format!(
            "graph inner
             b = Add(a, kept)
             output b
             end
             function my F (a, c) (r, a) axis, far=7
             kept = my::G(a) axis=$axis
             r = If(a) then_branch=@inner far=$far
             end
             function my G (a) (r) axis=1
             r = Softmax(a) axis=$axis
             end
             {AROUND}
             y, z = my::F(x, x) axis=3
             w = my::G(z)"
        ));
        let mut inlined = 0;
        for seed in 0..4000 {
            let mut damage = Damage::new(seed);
            let mut bytes = whole.clone();
            for _ in 0..1 + damage.below(3) {
                damage.strike(&mut bytes);
            }
            let model = ModelFile::parse(Path::new("model.onnx"), bytes.into());
            let Ok(model) = model else { continue };
            inlined += usize::from(model.inlined);
            // What is read can be written, and is read the same.
            let written = model.serialize(&GraphEdit::default(), None, &[]).concat();
            let again = ModelFile::parse(Path::new("model.onnx"), written.into()).unwrap();
            assert_eq!(
                shown(&again.graph.nodes),
                shown(&model.graph.nodes),
                "seed {seed}"
            );
        }
        assert!(
            inlined > 100,
            "the damage is too great to test anything: {inlined}"
        );
    }
}
