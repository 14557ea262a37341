//! From values to positions and colours along an axis, and the round numbers written beside it.

use super::picture::Color;

/// How values are spread along an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Evenly.
    #[default]
    Linear,
    /// By their logarithm; values that are not above 0 have no place.
    Log,
}

/// An axis, of a chart or of colours.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Axis {
    /// What is measured, with its unit.
    pub label: String,
    /// How values are spread.
    pub scale: Scale,
    /// The lowest and highest value that is shown; absent: those of the data. Values beyond are
    /// drawn at the end.
    pub range: Option<(f64, f64)>,
}

impl Axis {
    /// A linear axis over the range of the data.
    pub fn new(label: impl Into<String>) -> Axis {
        Axis {
            label: label.into(),
            ..Axis::default()
        }
    }

    /// A logarithmic axis over the range of the data.
    pub fn log(label: impl Into<String>) -> Axis {
        Axis {
            scale: Scale::Log,
            ..Axis::new(label)
        }
    }

    pub(super) fn fitted(&self, values: impl Iterator<Item = f64>) -> Fitted {
        let scale = self.scale;
        let placed = |value: f64| value.is_finite() && (scale == Scale::Linear || value > 0.0);
        let ends = |(low, high): (f64, f64), value: f64| (low.min(value), high.max(value));
        let given = self
            .range
            .filter(|(low, high)| placed(*low) && placed(*high) && low <= high);
        let data = values
            .filter(|value| placed(*value))
            .fold((f64::INFINITY, f64::NEG_INFINITY), ends);
        let (low, high) = match given {
            Some(range) => range,
            None if data.0 <= data.1 => data,
            None if scale == Scale::Log => (0.1, 1.0),
            None => (0.0, 1.0),
        };
        Fitted { scale, low, high }
    }
}

/// An axis with its ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fitted {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Fitted {
    /// Where a value is, from 0 to 1; `None` if it has no place.
    pub(super) fn place(&self, value: f64) -> Option<f64> {
        if !value.is_finite() || (self.scale == Scale::Log && value <= 0.0) {
            return None;
        }
        // Halved, so that no difference overflows.
        let spread = |value: f64| match self.scale {
            Scale::Linear => value / 2.0,
            Scale::Log => value.log10(),
        };
        let (low, high) = (spread(self.low), spread(self.high));
        match high > low {
            true => Some(((spread(value) - low) / (high - low)).clamp(0.0, 1.0)),
            false => Some(0.5),
        }
    }

    /// The axis widened to round numbers, so that its ends are labelled and lines do not touch
    /// them.
    pub(super) fn rounded(self) -> Fitted {
        let (low, high) = match self.scale {
            Scale::Log => (round_below(self.low), round_above(self.high)),
            Scale::Linear => {
                let stride = stride(self.low, self.high);
                (
                    (self.low / stride + 1e-9).floor() * stride,
                    (self.high / stride - 1e-9).ceil() * stride,
                )
            }
        };
        match low.is_finite() && high.is_finite() {
            true => Fitted { low, high, ..self },
            false => self,
        }
    }

    /// Round values with their places and how they are written.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let values: Vec<(f64, String)> = match self.scale {
            Scale::Linear => linear_ticks(self.low, self.high),
            Scale::Log => log_ticks(self.low, self.high),
        };
        let placed = values
            .into_iter()
            .filter_map(|(value, text)| Some((self.place(value)?, text)));
        placed.collect()
    }
}

/// The largest of 1, 2 and 5 times a power of ten that is not above `value`.
fn round_below(value: f64) -> f64 {
    let power = 10f64.powi(value.log10().floor() as i32);
    let digits = [5.0, 2.0, 1.0].map(|digit| digit * power);
    let round = digits
        .into_iter()
        .find(|round| *round <= value * (1.0 + 1e-9));
    round.filter(|round| *round > 0.0).unwrap_or(value)
}

fn round_above(value: f64) -> f64 {
    let power = 10f64.powi(value.log10().floor() as i32);
    let digits = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
    let round = digits
        .into_iter()
        .find(|round| *round >= value * (1.0 - 1e-9));
    round.unwrap_or(value)
}

/// The distance of round numbers of which some five cover the range.
fn stride(low: f64, high: f64) -> f64 {
    let rough = (high - low) / 5.0;
    if !(rough > 0.0 && rough.is_finite()) {
        return low.abs().max(1.0);
    }
    let power = 10f64.powi(rough.log10().floor() as i32);
    let digit = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|digit| digit * power >= rough * 0.999)
        .unwrap_or(10.0);
    digit * power
}

fn linear_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    if low >= high {
        return vec![(low, written(low, low.abs()))];
    }
    let stride = stride(low, high);
    let first = (low / stride - 1e-6).ceil();
    let count = ((high / stride + 1e-6).floor() - first).clamp(0.0, 20.0) as usize;
    let values = (0..=count).map(|i| (first + i as f64) * stride);
    values
        .map(|value| (value, written(value, stride)))
        .collect()
}

/// Powers of ten; where there are fewer than two, also their doubles and fivefolds.
fn log_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let of = |digits: &[f64]| -> Vec<f64> {
        let all = powers
            .clone()
            .flat_map(|power| digits.iter().map(move |digit| digit * 10f64.powi(power)));
        let inside = |value: &f64| *value >= low * 0.999 && *value <= high * 1.001;
        all.filter(inside).collect()
    };
    let mut values = of(&[1.0]);
    if values.len() < 2 {
        values = of(&[1.0, 2.0, 5.0]);
    }
    if values.len() < 2 {
        values = vec![low, high];
    }
    let every = values.len().div_ceil(7);
    let shown = values.into_iter().step_by(every);
    shown.map(|value| (value, written(value, value))).collect()
}

/// A number with as many digits as tell it from those a `stride` away.
fn written(value: f64, stride: f64) -> String {
    if value.abs() < stride * 1e-6 || value == 0.0 {
        return "0".to_owned();
    }
    let largest = value.abs().max(stride);
    if largest >= 1e6 || stride < 1e-4 {
        let exponent = |number: f64| (number.log10() + 1e-9).floor();
        let digits = (exponent(value.abs()) - exponent(stride)).clamp(0.0, 6.0) as usize;
        return format!("{value:.digits$e}");
    }
    let decimals = (-stride.log10() - 1e-9).ceil().clamp(0.0, 6.0) as usize;
    format!("{value:.decimals$}")
}

/// Eleven colours of viridis, which gets lighter evenly and reads in grey and to colour-blind eyes.
const VIRIDIS: [Color; 11] = [
    Color(0x44, 0x01, 0x54),
    Color(0x48, 0x24, 0x75),
    Color(0x41, 0x44, 0x87),
    Color(0x35, 0x5F, 0x8D),
    Color(0x2A, 0x78, 0x8E),
    Color(0x21, 0x91, 0x8C),
    Color(0x22, 0xA8, 0x84),
    Color(0x44, 0xBF, 0x70),
    Color(0x7A, 0xD1, 0x51),
    Color(0xBD, 0xDF, 0x26),
    Color(0xFD, 0xE7, 0x25),
];

/// The colour of a place from 0 to 1.
pub(super) fn viridis(place: f64) -> Color {
    let at = place.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let below = (at as usize).min(VIRIDIS.len() - 2);
    let (Color(r, g, b), Color(r2, g2, b2)) = (VIRIDIS[below], VIRIDIS[below + 1]);
    let share = at - below as f64;
    let mix = |a: u8, b: u8| (f64::from(a) * (1.0 - share) + f64::from(b) * share).round() as u8;
    Color(mix(r, r2), mix(g, g2), mix(b, b2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(axis: Axis, values: [f64; 2]) -> Vec<String> {
        let ticks = axis.fitted(values.into_iter()).ticks();
        ticks.into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn ticks_are_round_and_few() {
        let linear = || Axis::new("");
        let log = || Axis::log("");
        let cases: [(Axis, [f64; 2], &[&str]); 7] = [
            (
                linear(),
                [0.0, 1.0],
                &["0", "0.2", "0.4", "0.6", "0.8", "1.0"],
            ),
            (linear(), [0.93, 1.0], &["0.94", "0.96", "0.98", "1.00"]),
            (linear(), [-3.0, 40.0], &["0", "10", "20", "30", "40"]),
            (
                linear(),
                [0.0, 2e-5],
                &["0", "5e-6", "1.0e-5", "1.5e-5", "2.0e-5"],
            ),
            (linear(), [0.0, 3e7], &["0", "1e7", "2e7", "3e7"]),
            (
                log(),
                [2e-6, 0.3],
                &["1e-5", "0.0001", "0.001", "0.01", "0.1"],
            ),
            (log(), [0.2, 0.8], &["0.2", "0.5"]),
        ];
        for (axis, range, expected) in cases {
            assert_eq!(ticks(axis, range), expected);
        }
    }

    #[test]
    fn rounded_axes_end_on_round_numbers() {
        let ends = |axis: Axis, values: [f64; 2]| {
            let fitted = axis.fitted(values.into_iter()).rounded();
            (fitted.low, fitted.high)
        };
        assert_eq!(ends(Axis::new(""), [0.13, 0.87]), (0.0, 1.0));
        assert_eq!(ends(Axis::new(""), [0.0, 1.0]), (0.0, 1.0));
        assert_eq!(ends(Axis::log(""), [0.0013, 87.0]), (0.001, 100.0));
        assert_eq!(ends(Axis::log(""), [0.06, 40.0]), (0.05, 50.0));
    }

    #[test]
    fn places_and_colours_stay_inside() {
        let axis = Axis::log("").fitted([1e-6, 1e-2].into_iter());
        assert_eq!(axis.place(0.0), None);
        assert_eq!(axis.place(f64::NAN), None);
        assert_eq!(axis.place(1.0), Some(1.0));
        assert!((axis.place(1e-4).unwrap() - 0.5).abs() < 1e-12);
        assert_eq!(viridis(-1.0), VIRIDIS[0]);
        assert_eq!(viridis(2.0), VIRIDIS[10]);
        let one = Axis::new("").fitted([3.0, 3.0].into_iter());
        assert_eq!(one.place(3.0), Some(0.5));
    }

    #[test]
    fn every_range_has_few_ticks_that_lie_on_it() {
        let ends = [
            f64::MIN,
            -5.0,
            -1e-9,
            0.0,
            5e-324,
            1e-9,
            0.3,
            7.0,
            1e6,
            f64::MAX,
        ];
        for scale in [Scale::Linear, Scale::Log] {
            for low in ends {
                for high in ends {
                    let axis = Axis {
                        scale,
                        ..Axis::new("")
                    };
                    let fitted = axis.fitted([low, high].into_iter());
                    for fitted in [fitted, fitted.rounded()] {
                        let ticks = fitted.ticks();
                        assert!(ticks.len() <= 21, "{low} {high}: {ticks:?}");
                        for (place, text) in ticks {
                            assert!((0.0..=1.0).contains(&place));
                            assert!(text.len() < 24, "{low} {high}: {text}");
                        }
                    }
                }
            }
        }
    }
}
