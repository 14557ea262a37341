//! The number that tells a layer with explicit state what to do: the action, plus flags for what later steps still read.
//!
//! | number | means |
//! |---|---|
//! | 0 to 4 | the action: `full`, `asc`, `wa-rs`, `wa-rs+asc`, `ast` |
//! | + 8 | R is still read after this step |
//! | + 16 | the output is still read after this step |

/// What one layer does in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directive {
    /// Position of the action in the order of the table.
    pub action: u8,
    pub residual_live: bool,
    pub output_live: bool,
}

/// How many actions there are.
const ACTIONS: i64 = 5;
pub const RESIDUAL_LIVE: i64 = 8;
pub const OUTPUT_LIVE: i64 = 16;

impl Directive {
    pub fn encode(self) -> i64 {
        let flag = |set: bool, bit: i64| if set { bit } else { 0 };
        i64::from(self.action)
            + flag(self.residual_live, RESIDUAL_LIVE)
            + flag(self.output_live, OUTPUT_LIVE)
    }

    /// `None` for a number that means nothing.
    pub fn decode(number: i64) -> Option<Self> {
        let action = number & !(RESIDUAL_LIVE | OUTPUT_LIVE);
        (0..ACTIONS).contains(&action).then_some(Self {
            action: action as u8,
            residual_live: number & RESIDUAL_LIVE != 0,
            output_live: number & OUTPUT_LIVE != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_they_are_written_and_others_mean_nothing() {
        let mut known = 0;
        for number in -40..80 {
            if let Some(directive) = Directive::decode(number) {
                assert_eq!(directive.encode(), number);
                known += 1;
            }
        }
        assert_eq!(known, 5 * 4);
        assert_eq!(Directive::decode(5), None);
        assert_eq!(Directive::decode(32), None);
        assert_eq!(Directive::decode(-1), None);
    }
}
