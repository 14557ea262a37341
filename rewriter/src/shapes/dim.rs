//! Symbolic dimensions: rational multiples of products of symbols.

use std::collections::HashMap;

/// A symbol: a named input dimension, or an expression that is not a product (such as a sum).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Symbol(pub u32);

/// `num/den · Π symbol^power`. Equal dimensions compare equal; unequal ones may still coincide at run time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Dim {
    num: i64,
    den: i64,
    factors: Vec<(Symbol, i32)>,
}

impl From<i64> for Dim {
    fn from(value: i64) -> Self {
        Self {
            num: value,
            den: 1,
            factors: Vec::new(),
        }
    }
}

impl From<Symbol> for Dim {
    fn from(symbol: Symbol) -> Self {
        Self {
            num: 1,
            den: 1,
            factors: vec![(symbol, 1)],
        }
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a.abs() } else { gcd(b, a % b) }
}

impl Dim {
    /// The size, if it is a known integer.
    pub fn known(&self) -> Option<i64> {
        (self.factors.is_empty() && self.den == 1).then_some(self.num)
    }

    /// Whether it is a whole number of whole symbols: no fraction, no symbol below the line.
    pub fn is_whole(&self) -> bool {
        self.den == 1 && self.factors.iter().all(|&(_, p)| p > 0)
    }

    /// Whether it is a negative multiple: sizes are positive, so this is an offset from an end.
    pub fn is_negative(&self) -> bool {
        self.num < 0
    }

    pub fn depends_on(&self, symbol: Symbol) -> bool {
        self.factors.iter().any(|&(s, _)| s == symbol)
    }

    /// The product; `None` on overflow.
    pub fn times(&self, other: &Self) -> Option<Self> {
        let mut factors = self.factors.clone();
        for &(symbol, power) in &other.factors {
            match factors.iter_mut().find(|(s, _)| *s == symbol) {
                Some((_, p)) => *p += power,
                None => factors.push((symbol, power)),
            }
        }
        factors.retain(|&(_, p)| p != 0);
        factors.sort_unstable();
        let num = self.num.checked_mul(other.num)?;
        let den = self.den.checked_mul(other.den)?;
        let common = gcd(num, den).max(1);
        Some(Self {
            num: num / common,
            den: den / common,
            factors,
        })
    }

    /// The exact quotient; `None` for a zero divisor or overflow.
    pub fn over(&self, other: &Self) -> Option<Self> {
        if other.num == 0 {
            return None;
        }
        let sign = other.num.signum();
        let inverse = Self {
            num: other.den * sign,
            den: other.num.checked_mul(sign)?,
            factors: other.factors.iter().map(|&(s, p)| (s, -p)).collect(),
        };
        self.times(&inverse)
    }

    /// Product of all dimensions.
    pub fn product<'a>(dims: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        dims.into_iter().try_fold(Self::from(1), |a, b| a.times(b))
    }

    fn same_symbols(&self, other: &Self) -> bool {
        self.factors == other.factors
    }
}

/// The symbols in use and their names.
#[derive(Debug, Default)]
pub struct Symbols {
    names: Vec<String>,
    by_name: HashMap<String, Symbol>,
    sums: HashMap<(Dim, Dim, bool), Symbol>,
}

impl Symbols {
    /// The symbol called `name`, made on first use.
    pub fn named(&mut self, name: &str) -> Symbol {
        if let Some(&symbol) = self.by_name.get(name) {
            return symbol;
        }
        let symbol = self.fresh(name);
        self.by_name.insert(name.into(), symbol);
        symbol
    }

    /// A symbol equal to no other.
    pub fn fresh(&mut self, name: &str) -> Symbol {
        let symbol = Symbol(u32::try_from(self.names.len()).expect("fewer symbols than 2^32"));
        self.names.push(name.into());
        symbol
    }

    /// `a + b`, or `a − b`; a sum that is not a multiple of one product becomes a symbol of its own, the same for the same
    /// operands.
    pub fn sum(&mut self, a: &Dim, b: &Dim, minus: bool) -> Option<Dim> {
        let sign = if minus { -1 } else { 1 };
        if b.num == 0 {
            return Some(a.clone());
        }
        if a.num == 0 && !minus {
            return Some(b.clone());
        }
        if a.same_symbols(b) {
            let num = a
                .num
                .checked_mul(b.den)?
                .checked_add(b.num.checked_mul(a.den)?.checked_mul(sign)?)?;
            let den = a.den.checked_mul(b.den)?;
            let common = gcd(num, den).max(1);
            let factors = if num == 0 {
                Vec::new()
            } else {
                a.factors.clone()
            };
            return Some(Dim {
                num: num / common,
                den: den / common,
                factors,
            });
        }
        let key = (a.clone(), b.clone(), minus);
        if let Some(&symbol) = self.sums.get(&key) {
            return Some(symbol.into());
        }
        if let Some(rest) = self.undo(a, b, minus) {
            return Some(rest);
        }
        let sign = if minus { "−" } else { "+" };
        let name = format!("({} {sign} {})", self.show(a), self.show(b));
        let symbol = self.fresh(&name);
        self.sums.insert(key, symbol);
        if !minus {
            self.sums.insert((b.clone(), a.clone(), false), symbol);
        }
        Some(symbol.into())
    }

    /// `(x + y) − y = x` and `(x − y) + y = x`: how exporters slice one stream out of a joint sequence.
    fn undo(&self, a: &Dim, b: &Dim, minus: bool) -> Option<Dim> {
        let same = |symbol: &Symbol| *a == Dim::from(*symbol);
        self.sums
            .iter()
            .find(|((_, y, was_minus), symbol)| *was_minus != minus && y == b && same(symbol))
            .map(|((x, _, _), _)| x.clone())
    }

    /// Whether `sum` is the sum of `part` and something else.
    pub fn is_part(&self, part: &Dim, sum: &Dim) -> bool {
        self.undo(sum, part, true).is_some()
    }

    /// Whether `difference` is `a − b`, as far as that is known.
    pub fn is_difference(&self, difference: &Dim, a: &Dim, b: &Dim) -> bool {
        match (difference.known(), a.known(), b.known()) {
            (Some(difference), Some(a), Some(b)) => a.checked_sub(b) == Some(difference),
            _ => self.undo(difference, b, false).as_ref() == Some(a),
        }
    }

    /// For messages: `2·batch`, `64`, `height/2`.
    pub fn show(&self, dim: &Dim) -> String {
        let mut text = String::new();
        if dim.num != 1 || dim.factors.is_empty() {
            text.push_str(&dim.num.to_string());
        }
        for (symbol, power) in &dim.factors {
            for _ in 0..power.unsigned_abs() {
                if !text.is_empty() {
                    text.push(if *power > 0 { '·' } else { '/' });
                }
                text.push_str(&self.names[symbol.0 as usize]);
            }
        }
        if dim.den != 1 {
            text.push_str(&format!("/{}", dim.den));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshape_arithmetic_is_exact() {
        let mut symbols = Symbols::default();
        let batch = Dim::from(symbols.named("batch"));
        let total = Dim::product([&batch, &64.into(), &72.into()]).unwrap();
        let rest = total
            .over(&Dim::product([&4.into(), &18.into()]).unwrap())
            .unwrap();
        assert_eq!(rest, batch.times(&64.into()).unwrap());
        assert_eq!(symbols.show(&rest), "64·batch");
        assert_eq!(rest.over(&batch).unwrap().known(), Some(64));
    }

    #[test]
    fn equal_sums_are_one_symbol() {
        let mut symbols = Symbols::default();
        let (image, text) = (
            Dim::from(symbols.named("image")),
            Dim::from(symbols.named("text")),
        );
        let a = symbols.sum(&image, &text, false).unwrap();
        assert_eq!(a, symbols.sum(&text, &image, false).unwrap());
        assert_ne!(a, symbols.sum(&text, &image, true).unwrap());
        assert_eq!(
            symbols.sum(&image, &image, false).unwrap(),
            image.times(&2.into()).unwrap()
        );
        assert_eq!(symbols.sum(&image, &image, true).unwrap().known(), Some(0));
        assert_eq!(symbols.sum(&a, &text, true).unwrap(), image);
        let shorter = symbols.sum(&image, &1.into(), true).unwrap();
        assert!(symbols.is_difference(&shorter, &image, &1.into()));
        assert!(!symbols.is_difference(&image, &image, &1.into()));
        assert!(symbols.is_difference(&63.into(), &64.into(), &1.into()));
        assert_eq!(symbols.sum(&a, &image, true).unwrap(), text);
    }
}
