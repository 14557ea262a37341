//! Which instruction set and tuning this process uses: what was detected, unless tests force others.

use std::io::Write;
use std::sync::LazyLock;

use super::backend::Backend;
use super::names::Isa;
use super::native::Native;
use super::tuning::{MachineTuning, Tuning};

/// Forces an instruction set, by its name.
const ISA_VARIABLE: &str = "DITFASTATTN_ISA";

/// Forces a row of the tuning table, by its name. No result depends on it.
const TUNING_VARIABLE: &str = "DITFASTATTN_TUNING";

impl Isa {
    /// The instruction set of calls that do not name one: the best of this machine, or what `DITFASTATTN_ISA` says. Never
    /// one that the machine lacks.
    pub fn selected() -> Isa {
        static SELECTED: LazyLock<Isa> = LazyLock::new(|| {
            let all = Isa::available();
            forced(ISA_VARIABLE, &all, |isa| isa.name()).unwrap_or(all[0])
        });
        *SELECTED
    }
}

/// The tuning of calls at `isa`: of this machine, or what `DITFASTATTN_TUNING` says.
pub(crate) fn tuning(isa: Isa) -> Tuning {
    static FORCED: LazyLock<Option<MachineTuning>> =
        LazyLock::new(|| forced(TUNING_VARIABLE, Native::TUNINGS, |row| row.name));
    FORCED.unwrap_or_else(|| Native::tuning(isa)).tuning()
}

/// What a variable names. What is not among `all` is ignored, with a warning.
fn forced<T: Copy>(variable: &str, all: &[T], name: impl Fn(&T) -> &'static str) -> Option<T> {
    let value = std::env::var_os(variable)?;
    match named(&value.to_string_lossy(), all, &name) {
        Ok(found) => found,
        Err(there) => {
            // Not a panic if nobody can read it.
            let _ = writeln!(
                std::io::stderr(),
                "ditfastattn: {variable}={} is ignored: here there are {there}",
                value.to_string_lossy()
            );
            None
        }
    }
}

/// The one of this name, in any case; `None` for the empty name.
///
/// # Errors
/// The names there are, if it is none of them.
fn named<T: Copy>(
    value: &str,
    all: &[T],
    name: impl Fn(&T) -> &'static str,
) -> Result<Option<T>, String> {
    let value = value.trim();
    if value.is_empty() {
        return Ok(None);
    }
    let found = all.iter().find(|x| name(x).eq_ignore_ascii_case(value));
    let there = || all.iter().map(&name).collect::<Vec<_>>().join(", ");
    found.map(|x| Some(*x)).ok_or_else(there)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_there_is_can_be_named() {
        let all = [Isa::Avx2, Isa::Portable];
        let named = |value| named(value, &all, |isa| isa.name());
        assert_eq!(named("avx2"), Ok(Some(Isa::Avx2)));
        assert_eq!(named(" Portable\n"), Ok(Some(Isa::Portable)));
        assert_eq!(named(""), Ok(None));
        for absent in ["avx512", "neon", "avx", "sse2", "0"] {
            assert_eq!(named(absent), Err("avx2, portable".into()), "{absent}");
        }
    }

    #[test]
    fn tunings_have_names_of_their_own() {
        let mut names: Vec<_> = Native::TUNINGS.iter().map(|row| row.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Native::TUNINGS.len());
        for isa in Isa::available() {
            assert!(names.contains(&Native::tuning(isa).name), "{isa:?}");
        }
    }
}
