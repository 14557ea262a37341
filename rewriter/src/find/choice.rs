//! Which of the layers that were found are rewritten: `--only` and `--skip`, by index or name.

use std::str::FromStr;

/// The user's choice of layers. Nothing said: all.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    pub only: Vec<Pattern>,
    pub skip: Vec<Pattern>,
}

/// A layer index, a range `4-9`, or a node name in which `*` stands for anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    Indices(usize, usize),
    Name(String),
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index = |s: &str| s.parse::<usize>().ok();
        if text.is_empty() {
            return Err("expected a layer index, a range such as 4-9, or a name".into());
        }
        if let Some(only) = index(text) {
            return Ok(Self::Indices(only, only));
        }
        if let Some((first, last)) = text
            .split_once('-')
            .and_then(|(a, b)| index(a).zip(index(b)))
        {
            return if first <= last {
                Ok(Self::Indices(first, last))
            } else {
                Err(format!("the range {text} ends before it begins"))
            };
        }
        Ok(Self::Name(text.into()))
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Indices(a, b) if a == b => write!(f, "{a}"),
            Self::Indices(a, b) => write!(f, "{a}-{b}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl Pattern {
    /// Whether it means the layer with this index (among all that were found) and this node name.
    pub fn matches(&self, index: usize, name: &str) -> bool {
        match self {
            Self::Indices(first, last) => (*first..=*last).contains(&index),
            Self::Name(pattern) => wildcard(pattern, name),
        }
    }
}

/// Whether `name` is `pattern`, in which `*` stands for any characters. Without a star a part of the name is enough.
fn wildcard(pattern: &str, name: &str) -> bool {
    if !pattern.contains('*') {
        return name.contains(pattern);
    }
    let parts: Vec<&str> = pattern.split('*').collect();
    let (first, last) = (parts[0], parts[parts.len() - 1]);
    let Some(rest) = name
        .strip_prefix(first)
        .and_then(|rest| rest.strip_suffix(last))
    else {
        return false;
    };
    let mut rest = rest;
    for part in &parts[1..parts.len() - 1] {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

impl Choice {
    /// The first pattern that means none of these layers, and the option it was given to.
    pub fn unmatched(&self, layers: &[String]) -> Option<(&'static str, &Pattern)> {
        let all = [("--only", &self.only), ("--skip", &self.skip)];
        all.into_iter()
            .flat_map(|(option, patterns)| patterns.iter().map(move |p| (option, p)))
            .find(|(_, p)| {
                !layers
                    .iter()
                    .enumerate()
                    .any(|(i, name)| p.matches(i, name))
            })
    }

    /// Whether the layer is to be rewritten; else the option that excludes it.
    pub fn excludes(&self, index: usize, name: &str) -> Option<String> {
        let any = |patterns: &[Pattern]| patterns.iter().any(|p| p.matches(index, name));
        if !self.only.is_empty() && !any(&self.only) {
            return Some(format!("layer {index} is not among --only"));
        }
        self.skip
            .iter()
            .find(|p| p.matches(index, name))
            .map(|p| format!("layer {index} is left out by --skip {p}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_indices_ranges_and_names() {
        assert_eq!("7".parse(), Ok(Pattern::Indices(7, 7)));
        assert_eq!("4-9".parse(), Ok(Pattern::Indices(4, 9)));
        assert_eq!("a-b".parse(), Ok(Pattern::Name("a-b".into())));
        assert!("9-4".parse::<Pattern>().is_err());
        assert!("".parse::<Pattern>().is_err());
    }

    #[test]
    fn stars_stand_for_anything() {
        let name = "/model/temporal_blocks.3/attn1/Softmax";
        for yes in [
            "temporal",
            "*temporal*",
            "/model/*/Softmax",
            "/model/*.3/*",
            "*",
        ] {
            assert!(wildcard(yes, name), "{yes}");
        }
        for no in ["spatial", "temporal*", "/model/*.4/*", "*Softmax*x"] {
            assert!(!wildcard(no, name), "{no}");
        }
        assert!(!wildcard("ab*ba", "aba"));
    }

    #[test]
    fn skip_wins_over_only() {
        let choice = Choice {
            only: vec![Pattern::Indices(0, 3)],
            skip: vec![Pattern::Indices(2, 2)],
        };
        let left: Vec<usize> = (0..6)
            .filter(|&i| choice.excludes(i, "n").is_none())
            .collect();
        assert_eq!(left, [0, 1, 3]);
    }
}
