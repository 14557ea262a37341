//! What is known about the attributes and inputs of fused operators.
//!
//! Every attribute and input that an operator's schema has is listed, with what is done about it. Whatever is not listed is
//! newer than this version and may change the result, so it is a refusal that names it. Reads no values of tensors.

use crate::find::Reason;
use crate::onnx::{AttributeProto, AttributeType, Node};

/// What is done about an attribute.
pub enum Rule {
    /// Whoever reads the operator reads it.
    Read,
    /// Makes no difference to the result where everything else of the operator is accepted.
    Free,
    /// Only these numbers, which mean that there is no such thing.
    Only(&'static [f64], &'static str),
    /// Only this text.
    Text(&'static str, &'static str),
    /// Must be there with this number; without the attribute it is another.
    Must(i64, &'static str),
}

/// What is done about an input.
pub enum Input {
    Read,
    /// Must be left out: what it is.
    Absent(&'static str),
}

/// An operator, as its schema has it.
pub struct Operator {
    /// How messages call the newest version that is known.
    pub version: &'static str,
    pub attributes: &'static [(&'static str, Rule)],
    /// In their order.
    pub inputs: &'static [Input],
}

const NO_SOFTCAP: Rule = Rule::Only(&[0.0], "a cap on the scores");
const NO_WINDOW: Rule = Rule::Only(&[-1.0], "a window");
const NO_CAUSAL: Rule = Rule::Only(&[0.0], "causal attention");
const NO_ROTARY: Rule = Rule::Only(&[0.0], "rotary embeddings inside");
const NOT_QUANTISED: Rule = Rule::Text("NONE", "a quantised key cache");
const KEY_CACHE: Input = Input::Absent("a key cache");
const VALUE_CACHE: Input = Input::Absent("a value cache");
const PAST_LENGTHS: Input = Input::Absent("past lengths");

pub const ATTENTION: Operator = Operator {
    version: "ai.onnx 25",
    attributes: &[
        ("is_causal", NO_CAUSAL),
        ("kv_num_heads", Rule::Read),
        ("q_num_heads", Rule::Read),
        ("scale", Rule::Read),
        ("softcap", NO_SOFTCAP),
        // What an output holds that must not be used.
        ("qk_matmul_output_mode", Rule::Free),
        // Softmax runs in float32: as the operator's own default, or more exact than what is asked for; for float64 the inputs
        // are too coarse to tell.
        (
            "softmax_precision",
            Rule::Only(&[0.0, 1.0, 10.0, 11.0, 16.0], "another type of softmax"),
        ),
        // Since version 25.
        ("left_window_size", NO_WINDOW),
        ("right_window_size", NO_WINDOW),
    ],
    inputs: &[
        Input::Read,
        Input::Read,
        Input::Read,
        Input::Read,
        KEY_CACHE,
        VALUE_CACHE,
        // Since version 24.
        Input::Absent("padding lengths"),
    ],
};

pub const MULTI_HEAD: Operator = Operator {
    version: "com.microsoft 1 of ONNX Runtime 1.32",
    attributes: &[
        ("num_heads", Rule::Read),
        ("scale", Rule::Read),
        ("unidirectional", NO_CAUSAL),
        // For padded keys only.
        ("mask_filter_value", Rule::Free),
    ],
    inputs: &[
        Input::Read,
        Input::Read,
        Input::Read,
        Input::Read,
        Input::Absent("a key padding mask"),
        Input::Read,
        KEY_CACHE,
        VALUE_CACHE,
        PAST_LENGTHS,
        Input::Absent("beam search"),
    ],
};

pub const WITH_WEIGHTS: Operator = Operator {
    version: "com.microsoft 1 of ONNX Runtime 1.32",
    attributes: &[
        ("num_heads", Rule::Read),
        ("scale", Rule::Read),
        ("qkv_hidden_sizes", Rule::Read),
        ("unidirectional", NO_CAUSAL),
        ("do_rotary", NO_ROTARY),
        // For padded keys, rotary embeddings and caches only.
        ("mask_filter_value", Rule::Free),
        ("rotary_embedding_dim", Rule::Free),
        ("past_present_share_buffer", Rule::Free),
    ],
    inputs: &[
        Input::Read,
        Input::Read,
        Input::Read,
        Input::Absent("a mask index"),
        Input::Absent("a cache"),
        Input::Read,
        PAST_LENGTHS,
    ],
};

pub const GROUP_QUERY: Operator = Operator {
    version: "com.microsoft 1 of ONNX Runtime 1.32",
    attributes: &[
        ("num_heads", Rule::Read),
        ("kv_num_heads", Rule::Read),
        ("scale", Rule::Read),
        ("causal", Rule::Must(0, "causal attention")),
        ("do_rotary", NO_ROTARY),
        ("softcap", NO_SOFTCAP),
        ("local_window_size", NO_WINDOW),
        (
            "smooth_softmax",
            Rule::Only(&[-1.0, 0.0], "a smoothed softmax"),
        ),
        (
            "sliding_window_cache",
            Rule::Only(&[0.0], "a cache with a window"),
        ),
        ("k_quant_type", NOT_QUANTISED),
        ("v_quant_type", NOT_QUANTISED),
        // For rotary embeddings, quantised caches, norms and an output that must not be used.
        ("rotary_interleaved", Rule::Free),
        ("kv_cache_bit_width", Rule::Free),
        ("qk_norm_epsilon", Rule::Free),
        ("q_norm_epsilon", Rule::Free),
        ("k_norm_epsilon", Rule::Free),
        ("qk_output", Rule::Free),
    ],
    inputs: &[
        Input::Read,
        Input::Read,
        Input::Read,
        KEY_CACHE,
        VALUE_CACHE,
        Input::Read,
        Input::Read,
        Input::Absent("a table of cosines"),
        Input::Absent("a table of sines"),
        Input::Absent("position ids"),
        Input::Read,
        Input::Absent("a sink per head"),
        Input::Absent("scales of a quantised key cache"),
        Input::Absent("scales of a quantised value cache"),
        Input::Absent("a norm of the queries"),
        Input::Absent("a norm of the keys"),
        Input::Absent("lengths of the queries"),
    ],
};

pub const FUSED_MATMUL: Operator = Operator {
    version: "com.microsoft 1 of ONNX Runtime 1.32",
    attributes: &[
        ("alpha", Rule::Read),
        ("transA", Rule::Read),
        ("transB", Rule::Read),
        ("transBatchA", Rule::Read),
        ("transBatchB", Rule::Read),
    ],
    inputs: &[Input::Read, Input::Read],
};

impl Operator {
    /// Refuses `node` if it has an attribute or an input that changes the result in a way that is not computed here, or that is
    /// not known.
    pub fn check(&self, node: &Node) -> Result<(), Reason> {
        let refuse = |what: String| Err(Reason::new(what, [node.label()]));
        let op = node.op();
        let named = |name: &str| self.attributes.iter().find(|(n, _)| *n == name);
        for attribute in node.attributes() {
            let name = attribute.name.as_str();
            let Some((_, rule)) = named(name) else {
                return refuse(format!(
                    "{op} with {name} = {}: the attribute is not known (known: those of {}), so neither is what it computes",
                    shown(attribute),
                    self.version
                ));
            };
            if let Err((what, expected)) = rule.check(attribute) {
                return refuse(format!(
                    "{op} with {name} = {} ({what}) is not supported, expected {expected}",
                    shown(attribute)
                ));
            }
        }
        for (name, rule) in self.attributes {
            if let Rule::Must(value, what) = rule
                && node.attribute(name).is_none()
            {
                return refuse(format!(
                    "{op} without {name} ({what} by default) is not supported, expected {name} = {value}"
                ));
            }
        }
        for index in 0..node.proto.input.len() {
            let Some(value) = node.input(index) else {
                continue;
            };
            match self.inputs.get(index) {
                Some(Input::Read) => {}
                Some(Input::Absent(what)) => {
                    return refuse(format!("{op} with {what} (`{value}`) is not supported"));
                }
                None => {
                    return refuse(format!(
                        "{op} with `{value}` as input {index}: the input is not known (known: those of {}), so neither is what it computes",
                        self.version
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Rule {
    /// What a value that is not accepted would mean, and what is accepted.
    fn check(&self, attribute: &AttributeProto) -> Result<(), (&'static str, String)> {
        let number = number(attribute);
        match self {
            Self::Read | Self::Free => Ok(()),
            Self::Only(values, what) => match number {
                Some(n) if values.contains(&n) => Ok(()),
                _ => {
                    let values: Vec<_> = values.iter().map(f64::to_string).collect();
                    Err((what, values.join(" or ")))
                }
            },
            Self::Must(value, what) => match number {
                Some(n) if n == *value as f64 => Ok(()),
                _ => Err((what, value.to_string())),
            },
            Self::Text(text, what) => match &attribute.s {
                Some(s) if s == text.as_bytes() => Ok(()),
                _ => Err((what, (*text).to_owned())),
            },
        }
    }
}

/// The number of an attribute that is one; some writers leave out zeros.
fn number(attribute: &AttributeProto) -> Option<f64> {
    match AttributeType::try_from(attribute.r#type).ok()? {
        AttributeType::Int => Some(attribute.i.unwrap_or(0) as f64),
        AttributeType::Float => Some(f64::from(attribute.f.unwrap_or(0.0))),
        _ => None,
    }
}

/// The value, for messages: short, and without control characters.
fn shown(attribute: &AttributeProto) -> String {
    if let Some(number) = number(attribute) {
        return number.to_string();
    }
    let list = |numbers: Vec<String>| format!("[{}]", numbers.join(", "));
    match (&attribute.s, &attribute.ints[..], &attribute.floats[..]) {
        (Some(text), ..) => {
            let text: String = String::from_utf8_lossy(text).chars().take(40).collect();
            format!("\"{}\"", text.escape_default())
        }
        (None, [], []) => "a value of another kind".into(),
        (None, ints, []) => list(ints.iter().take(8).map(i64::to_string).collect()),
        (None, _, floats) => list(floats.iter().take(8).map(f32::to_string).collect()),
    }
}
