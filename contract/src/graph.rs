//! Names of the inputs and outputs that a rewritten graph has beside the model's own.

/// Whose step it is (int64), and whether it is a generation's first and last (bool).
pub const REQUEST_ID: &str = "dfa_request_id";
pub const START: &str = "dfa_start";
pub const END: &str = "dfa_end";

/// Of a graph that carries the state: the step's place in the plan (int64), or one directive per layer.
pub const STEP: &str = "dfa_step";
pub const DIRECTIVES: &str = "dfa_directives";

/// Before or after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    Past,
    Present,
}

impl Time {
    const fn name(self) -> &'static str {
        match self {
            Self::Past => "past",
            Self::Present => "present",
        }
    }
}

/// R of `layer`: `past.3.residual`.
pub fn residual(time: Time, layer: usize) -> String {
    format!("{}.{layer}.residual", time.name())
}

/// The output of `layer` at one of its `sinks`: `present.3.output`, or `present.3.output_1` of several.
pub fn output(time: Time, layer: usize, sink: usize, sinks: usize) -> String {
    let time = time.name();
    match sinks {
        1 => format!("{time}.{layer}.output"),
        _ => format!("{time}.{layer}.output_{sink}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_documentation() {
        assert_eq!(residual(Time::Past, 3), "past.3.residual");
        assert_eq!(output(Time::Present, 3, 0, 1), "present.3.output");
        assert_eq!(output(Time::Past, 3, 1, 2), "past.3.output_1");
    }
}
