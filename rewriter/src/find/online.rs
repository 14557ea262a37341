//! Softmaxes written out in other ways than the one that is read as attention: with the keys in blocks and a running maximum,
//! or with the division behind the product with v. Named, and left alone.

use super::anchor::{is_written_out, leads_to_product};
use super::source::root;
use crate::onnx::{Graph, Node};
use crate::shapes::{self, COPY, SCALE, SUM};
use std::collections::HashSet;

const IN_BLOCKS: &str = "attention whose keys are processed in blocks (an online softmax written out) is not recognised";
const DIVIDED_ELSEWHERE: &str = "a softmax written out whose division is not that of its exponentials by their sum is not recognised";

/// The first exponential of each such attention, and why it is left alone.
pub fn sites(graph: &Graph) -> Vec<(&Node, &'static str)> {
    let mut queries = HashSet::new();
    let found = graph.nodes.iter().filter_map(|exp| {
        let (scores, shift) = shifted(graph, exp)?;
        let is_found = |&user: &usize| is_written_out(graph, &graph.nodes[user]);
        if graph.consumers(exp.output(0)).iter().any(is_found) {
            return None;
        }
        let why = match shift.is("ReduceMax") && shift.input(0) == Some(scores) {
            true => DIVIDED_ELSEWHERE,
            false => IN_BLOCKS,
        };
        // All blocks of one attention have the queries in common.
        queries
            .insert(queries_of(graph, scores)?)
            .then_some((exp, why))
    });
    found.collect()
}

/// `(scores, maximum)` of exp(scores − maximum), whose scores are a product of two activations.
fn shifted<'g>(graph: &'g Graph, exp: &'g Node) -> Option<(&'g str, &'g Node)> {
    let (sub, _) = graph.producer(exp.input(0).filter(|_| exp.is("Exp"))?)?;
    let (scores, shift) = (sub.input(0)?, sub.input(1).filter(|_| sub.is("Sub"))?);
    let (max, _) = graph.producer(root(graph, shift))?;
    let is_max = max.is("Max") || max.is("ReduceMax");
    (is_max && leads_to_product(graph, scores)).then_some((scores, max))
}

/// The first operand of the product that `scores` are.
fn queries_of<'g>(graph: &'g Graph, scores: &'g str) -> Option<&'g str> {
    let mut at = scores;
    loop {
        let (node, _) = graph.producer(at)?;
        let input = node.input(0)?;
        if !shapes::is(node, COPY | SCALE | SUM) && !node.is("Where") {
            return Some(input);
        }
        at = if node.is("Where") {
            node.input(1)?
        } else {
            input
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::testing::model;

    fn found(text: &str) -> Vec<(String, &'static str)> {
        let text = format!(
            "opset 17
             input q float [b, 4, 64, 8]
             input k0 float [b, 4, 8, 32]
             input k1 float [b, 4, 8, 32]
             weight w [8, 32]
             ints last [-1]
             {text}"
        );
        let graph = model(&text).graph;
        let sites = sites(&graph).into_iter();
        sites.map(|(n, why)| (n.label().to_owned(), why)).collect()
    }

    #[test]
    fn keys_in_blocks_are_one_site() {
        let text = "s0 = MatMul(q, k0)
            s1 = MatMul(q, k1)
            m0 = ReduceMax(s0) axes=[-1]
            m1 = ReduceMax(s1) axes=[-1]
            m = Max(m0, m1)
            d0 = Sub(s0, m)
            d1 = Sub(s1, m)
            e0 = Exp(d0)
            e1 = Exp(d1)
            shift = Sub(m0, m)
            rescale = Exp(shift)
            n0 = ReduceSum(e0, last)
            n1 = ReduceSum(e1, last)
            r0 = Mul(n0, rescale)
            n = Add(r0, n1)
            y = Div(e1, n)";
        assert_eq!(found(text), [("node_e0".to_owned(), IN_BLOCKS)]);
    }

    #[test]
    fn what_is_read_as_attention_or_is_no_attention_is_no_site() {
        let softmax = "s = MatMul(q, k0)
            m = ReduceMax(s) axes=[-1]
            d = Sub(s, m)
            e = Exp(d)
            n = ReduceSum(e, last)\n";
        assert!(found(&format!("{softmax}p = Div(e, n)")).is_empty());
        let divided_later = format!("{softmax}u = MatMul(e, v)\no = Div(u, n)");
        assert_eq!(
            found(&divided_later),
            [("node_e".to_owned(), DIVIDED_ELSEWHERE)]
        );
        // A classifier's softmax.
        let projection = divided_later.replace("MatMul(q, k0)", "MatMul(q, w)");
        assert!(found(&projection).is_empty());
    }
}
