//! Which graph input is the timestep, which are the latents, and which are conditioning.

use super::{latents, timestep};
use crate::onnx::Graph;

/// The graph inputs that the step op watches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inputs {
    pub timestep: String,
    pub latents: String,
    /// Every other input without a default, in file order.
    pub conditioning: Vec<String>,
}

/// What the user named explicitly.
#[derive(Clone, Debug, Default)]
pub struct InputsRequest {
    pub timestep: Option<String>,
    pub latents: Option<String>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InputsError {
    #[error("the model has no input called `{name}` ({option}); its inputs are {inputs}")]
    NoSuchInput {
        name: String,
        option: &'static str,
        inputs: String,
    },
    #[error(
        "no timestep input found: no graph input reaches a sinusoidal embedding (Sin/Cos), and none is an integer that picks a row of a table; name it with --timestep-input, one of {inputs}"
    )]
    NoTimestep { inputs: String },
    #[error("several inputs could be the timestep: {candidates}; name it with --timestep-input")]
    ManyTimesteps { candidates: String },
    #[error(
        "no latents input found: expected a floating-point input of rank 3 or more, or one with the shape of a result, among {inputs}; name it with --latents-input"
    )]
    NoLatents { inputs: String },
    #[error(
        "several inputs could be the latents: {candidates} ({why}); name the one that is denoised with --latents-input"
    )]
    ManyLatents {
        candidates: String,
        why: &'static str,
    },
    #[error(
        "the model's attention is out of reach: {reason}; export the denoiser by itself, so that its attention is in the main graph"
    )]
    InSubgraph { reason: String },
    #[error(
        "{option} {pattern}: no such layer; the model has {layers} self-attention layer(s), indices from 0; `dfa-rewrite inspect` lists them with their names"
    )]
    NoSuchLayer {
        option: &'static str,
        pattern: String,
        layers: usize,
    },
}

/// Finds the inputs by structure first and by customary names only to break ties.
///
/// # Errors
/// Names that are not inputs, and roles that cannot be decided.
pub fn find(graph: &Graph, request: &InputsRequest) -> Result<Inputs, InputsError> {
    let fed: Vec<_> = graph.inputs.iter().filter(|i| !i.has_default).collect();
    let names = || {
        let list: Vec<_> = fed.iter().map(|i| format!("`{}`", i.name)).collect();
        if list.is_empty() {
            "none".into()
        } else {
            list.join(", ")
        }
    };
    let named = |name: &String, option| {
        if graph.inputs.iter().any(|i| i.name == *name) {
            Ok(name.clone())
        } else {
            Err(InputsError::NoSuchInput {
                name: name.clone(),
                option,
                inputs: names(),
            })
        }
    };
    let timestep = match &request.timestep {
        Some(name) => named(name, "--timestep-input")?,
        None => timestep::find(graph, &fed)?
            .ok_or_else(|| InputsError::NoTimestep { inputs: names() })?,
    };
    let latents = match &request.latents {
        Some(name) => named(name, "--latents-input")?,
        None => latents::find(graph, &fed, &timestep)?
            .ok_or_else(|| InputsError::NoLatents { inputs: names() })?,
    };
    let conditioning = fed
        .iter()
        .map(|i| i.name.clone())
        .filter(|n| *n != timestep && *n != latents)
        .collect();
    Ok(Inputs {
        timestep,
        latents,
        conditioning,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::testing::model;

    fn found(text: &str) -> Result<Inputs, InputsError> {
        find(&model(text).graph, &InputsRequest::default())
    }

    fn timestep(inputs: &str, nodes: &str) -> Result<String, InputsError> {
        let text = format!(
            "opset 17
             input x float [b, n, 8]
             {inputs}
             weight table [100, 8]
             weight w [8, 8]
             ints one [1]
             {nodes}
             output out float [b, n, 8]"
        );
        found(&text).map(|i| i.timestep)
    }

    fn latents(inputs: &[&str], output: &str) -> Result<String, InputsError> {
        let inputs: Vec<_> = inputs.iter().map(|i| format!("input {i}")).collect();
        let text = format!(
            "opset 17
             input t float [b]
             {}
             e = Sin(t)
             output {output}",
            inputs.join("\n")
        );
        found(&text).map(|i| i.latents)
    }

    #[test]
    fn a_timestep_has_any_rank_where_it_reaches_a_sine() {
        for shape in ["[]", "[b]", "[1, 1]", "[b, 1, 1, 1]", "[b, n]", "[b, n, 2]"] {
            let input = format!("input when float {shape}");
            assert_eq!(
                timestep(&input, "s = Sin(when)"),
                Ok("when".into()),
                "{shape}"
            );
        }
        // Positions reach sines too.
        let positions = "input pos float [b, n, 3]\ninput when float [b]";
        assert_eq!(
            timestep(positions, "p = Cos(pos)\ns = Sin(when)"),
            Ok("when".into())
        );
        assert!(matches!(
            timestep("input pos float [b, n, 3]", "p = Cos(pos)"),
            Err(InputsError::NoTimestep { .. })
        ));
        // Something that has one number per row may be the timestep, whatever reaches a sine in another shape.
        let unclear = timestep(
            "input signal float [b, n, 3]\ninput when float [b]",
            "s = Sin(signal)\ne = MatMul(when, w)",
        );
        let candidates = "`signal`, `when`".into();
        assert_eq!(unclear, Err(InputsError::ManyTimesteps { candidates }));
    }

    #[test]
    fn an_integer_that_picks_a_row_of_a_table_is_a_timestep() {
        let gather = "i = Cast(when) to=7\nj = Add(i, one)\ne = Gather(table, j)";
        for shape in ["int64 [b]", "int32 [1]", "int64 []", "int32 [1, 1]"] {
            let input = format!("input when {shape}");
            assert_eq!(timestep(&input, gather), Ok("when".into()), "{shape}");
        }
        let slice = "u = Add(when, one)\ne = Slice(table, when, u)";
        assert_eq!(timestep("input when int64 [1]", slice), Ok("when".into()));
        // Where a table ends is a length.
        for (input, nodes) in [
            ("input when int64 [1]", "e = Slice(table, one, when)"),
            ("input ids int64 [b, n]", "e = Gather(table, ids)"),
            (
                "input class_labels int64 [b]",
                "e = Gather(table, class_labels)",
            ),
            ("input y int64 [b]", "e = Gather(table, y)"),
        ] {
            let none = timestep(input, nodes);
            assert!(
                matches!(none, Err(InputsError::NoTimestep { .. })),
                "{none:?}"
            );
        }
    }

    #[test]
    fn a_sine_wins_over_a_table_and_names_break_ties() {
        let both = "input step int64 [b]\ninput when float [b]";
        let nodes = "e = Gather(table, step)\ns = Sin(when)";
        assert_eq!(timestep(both, nodes), Ok("when".into()));
        let two = "input a int64 [b]\ninput b int64 [b]";
        let nodes = "e = Gather(table, a)\nf = Gather(table, b)";
        let candidates = "`a`, `b`".to_owned();
        assert_eq!(
            timestep(two, nodes),
            Err(InputsError::ManyTimesteps { candidates })
        );
        let named = "input a int64 [b]\ninput time_step int64 [b]";
        let nodes = "e = Gather(table, a)\nf = Gather(table, time_step)";
        assert_eq!(timestep(named, nodes), Ok("time_step".into()));
        // A time that goes into a learnt embedding, and a kind that picks a row.
        let learnt = "input kind int64 [b]\ninput when float [b]";
        let nodes = "e = Gather(table, kind)\ns = MatMul(when, w)";
        assert!(matches!(
            timestep(learnt, nodes),
            Err(InputsError::ManyTimesteps { .. })
        ));
    }

    #[test]
    fn latents_look_like_the_result_exactly_before_roughly() {
        let out = "out float [b, 64, 3]";
        let pair = "z float [b, 64, 64, 16]";
        assert_eq!(
            latents(&["r float [b, 64, 3]", "s float [b, 64, 20]", pair], out),
            Ok("r".into())
        );
        assert_eq!(latents(&["s float [b, 64, 20]", pair], out), Ok("s".into()));
        assert_eq!(
            latents(&["r float16 [b, 64, 3]", "s float [b, 64, 3]"], out),
            Ok("s".into())
        );
        assert_eq!(
            latents(&["a float [n, 3]", "b float [n, 9]"], "out float [n, 3]"),
            Ok("a".into())
        );
        assert_eq!(
            latents(&["a float [b, 7]", "sample float [b, 9, 9]"], "out float"),
            Ok("sample".into())
        );
        assert_eq!(
            latents(&["a float [b, 7, 7]", pair], "out float"),
            Ok("z".into())
        );
    }

    #[test]
    fn equally_likely_latents_are_an_error_that_names_them() {
        let out = "out float [b, 64, 3]";
        let two = ["p float [b, 64, 3]", "q float [b, 64, 3]"];
        let error = latents(&two, out).unwrap_err().to_string();
        for word in ["`p`, `q`", "--latents-input", "shape and type"] {
            assert!(error.contains(word), "{error}");
        }
        let named = [two[0], two[1], "noise float [b, 64, 3]"];
        assert_eq!(latents(&named, out), Ok("noise".into()));
        let unlike = ["p float [b, 5, 3]", "q float [b, 7, 9]"];
        assert!(matches!(
            latents(&unlike, "out float"),
            Err(InputsError::ManyLatents { .. })
        ));
        assert!(matches!(
            latents(&["p float [b, 5]"], "out float"),
            Err(InputsError::NoLatents { .. })
        ));
    }
}
