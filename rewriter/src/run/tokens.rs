//! Which tokens of a layer are text, as found and as used: what to make of the two.
//!
//! Owns the verdict; knows neither models nor how tokens were looked at.

use serde::{Serialize, Serializer};
use std::fmt;

/// Places in a sequence, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens(Vec<usize>);

impl Tokens {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The places that are in no `other`.
    fn without(&self, other: &Self) -> Self {
        self.0.iter().filter(|t| !other.0.contains(t)).collect()
    }

    /// First and last place of each stretch without a gap.
    fn ranges(&self) -> Vec<(usize, usize)> {
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for &token in &self.0 {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == token => *last = token,
                _ => ranges.push((token, token)),
            }
        }
        ranges
    }

    /// The side of a sequence of `all` tokens on which they lie without a gap.
    fn side(&self, all: usize) -> Option<&'static str> {
        match self.ranges()[..] {
            [(0, _)] => Some("start"),
            [(_, last)] if last + 1 == all => Some("end"),
            _ => None,
        }
    }
}

impl FromIterator<usize> for Tokens {
    fn from_iter<I: IntoIterator<Item = usize>>(places: I) -> Self {
        Self(places.into_iter().collect())
    }
}

impl<'a> FromIterator<&'a usize> for Tokens {
    fn from_iter<I: IntoIterator<Item = &'a usize>>(places: I) -> Self {
        places.into_iter().copied().collect()
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self
            .ranges()
            .into_iter()
            .map(|(first, last)| match first == last {
                true => first.to_string(),
                false => format!("{first}-{last}"),
            });
        match self.is_empty() {
            true => f.write_str("none"),
            false => f.write_str(&ranges.collect::<Vec<_>>().join(", ")),
        }
    }
}

impl Serialize for Tokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.ranges().serialize(serializer)
    }
}

/// What came out for one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The text that the layer uses is the text that was found.
    Same,
    /// It is not.
    Differs,
    /// Running does not show it.
    Unknown,
}

/// What to make of `found`, the tokens of `all` that do not depend on the latents, and `used`, those that windows spare. `mixes` names
/// something that may bring the latents to text tokens all the same. With the reason, unless they are the same.
pub fn judge(
    all: usize,
    found: &Tokens,
    used: &Tokens,
    mixes: Option<&str>,
) -> (Verdict, Option<String>) {
    let (missed, excess) = (found.without(used), used.without(found));
    if found.len() == all {
        let why = "no token depends on the latents by itself";
        return (Verdict::Unknown, Some(why.into()));
    }
    if missed.is_empty() && excess.is_empty() {
        return (Verdict::Same, None);
    }
    if found.is_empty() {
        let why = "all tokens depend on the latents by themselves, as behind a modulation from all latents";
        return (Verdict::Unknown, Some(why.into()));
    }
    if missed.is_empty()
        && let Some(mixes) = mixes
    {
        let why = format!("text tokens may depend on the latents through `{mixes}`");
        return (Verdict::Unknown, Some(why));
    }
    let mut why = format!(
        "of its {all} tokens {found} do not depend on the latents and so are text, but windows take "
    );
    why += &match used.is_empty() {
        true => "none for text".to_owned(),
        false => format!("{used} for text"),
    };
    (Verdict::Differs, Some(why))
}

/// What the plan should say instead, or what else to do. `heard`: the plan's text is meant for this layer.
pub fn remedy(layer: usize, all: usize, found: &Tokens, heard: bool) -> String {
    match found.side(all).filter(|_| heard) {
        Some(side) => format!(
            "say \"text\": {{\"tokens\": {}, \"side\": \"{side}\"}} in the plan, or leave the layer out with --skip {layer}",
            found.len()
        ),
        None => format!("leave the layer out with --skip {layer}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(found: std::ops::Range<usize>, used: std::ops::Range<usize>) -> Verdict {
        judge(10, &found.collect(), &used.collect(), None).0
    }

    #[test]
    fn places_are_shown_as_ranges() {
        let places: Tokens = [0, 1, 2, 5, 8, 9].iter().collect();
        assert_eq!(places.to_string(), "0-2, 5, 8-9");
        assert_eq!(
            serde_json::to_string(&places).unwrap(),
            "[[0,2],[5,5],[8,9]]"
        );
        assert_eq!(Tokens::default().to_string(), "none");
    }

    #[test]
    fn text_that_is_used_as_it_was_found_is_right() {
        assert_eq!(verdict(0..3, 0..3), Verdict::Same);
        assert_eq!(verdict(0..0, 0..0), Verdict::Same);
    }

    #[test]
    fn text_on_the_wrong_side_or_of_another_number_is_wrong() {
        assert_eq!(verdict(0..3, 7..10), Verdict::Differs);
        assert_eq!(verdict(0..3, 0..2), Verdict::Differs);
        assert_eq!(verdict(0..3, 0..4), Verdict::Differs);
        assert_eq!(verdict(0..3, 0..0), Verdict::Differs);
    }

    #[test]
    fn where_all_tokens_or_none_depend_on_the_latents_nothing_is_known() {
        assert_eq!(verdict(0..0, 0..3), Verdict::Unknown);
        assert_eq!(verdict(0..10, 0..3), Verdict::Unknown);
    }

    #[test]
    fn text_that_depends_on_the_latents_may_be_so_by_attention_that_stayed() {
        let (found, used): (Tokens, Tokens) = ((0..3).collect(), (0..4).collect());
        assert_eq!(judge(10, &found, &used, Some("p")).0, Verdict::Unknown);
        // What does not depend on them is text in any case.
        assert_eq!(judge(10, &used, &found, Some("p")).0, Verdict::Differs);
    }

    #[test]
    fn the_remedy_is_the_plans_text_where_it_can_say_it() {
        let start: Tokens = (0..3).collect();
        assert!(remedy(1, 10, &start, true).contains(r#""tokens": 3, "side": "start""#));
        let end: Tokens = (7..10).collect();
        assert!(remedy(1, 10, &end, true).contains(r#""side": "end""#));
        for (tokens, heard) in [([0, 9].iter().collect(), true), (start, false)] {
            assert_eq!(
                remedy(1, 10, &tokens, heard),
                "leave the layer out with --skip 1"
            );
        }
    }
}
