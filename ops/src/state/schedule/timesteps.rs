//! The planned timesteps, and how far a fed one may be from one of them and still be it.

/// Relative error up to which a fed timestep still is the planned one: twice what rounding to bfloat16 does.
const TOLERANCE: f64 = 4e-3;

/// Never accept more than this part of the gap to the neighbouring planned value. Below one half, so that a value
/// belongs to one planned value at most.
const GAP_PART: f64 = 0.45;

#[derive(Clone, Copy, Debug)]
pub struct Planned {
    pub value: f64,
    pub tolerance: f64,
}

impl Planned {
    pub fn fits(&self, value: f64) -> bool {
        (self.value - value).abs() <= self.tolerance
    }
}

/// The list, each value with a tolerance that keeps it apart from its neighbours.
pub fn with_tolerances(values: &[f64]) -> Vec<Planned> {
    let largest = values.iter().fold(0.0f64, |max, v| max.max(v.abs()));
    values
        .iter()
        .map(|&value| {
            let gap = values
                .iter()
                .map(|other| (other - value).abs())
                .filter(|&gap| gap > 0.0)
                .fold(f64::INFINITY, f64::min);
            let rounding = (TOLERANCE * value.abs()).max(1e-6 * largest);
            Planned {
                value,
                tolerance: rounding.min(GAP_PART * gap),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_never_means_two_different_planned_values(
            list in prop::collection::vec(-1000.0f64..1000.0, 1..20), value in -1100.0f64..1100.0
        ) {
            let planned = with_tolerances(&list);
            let mut hits: Vec<f64> = planned.iter()
                .filter(|p| (p.value - value).abs() <= p.tolerance).map(|p| p.value).collect();
            hits.dedup();
            prop_assert!(hits.windows(2).all(|w| w[0] == w[1]), "{:?}", hits);
        }
    }
}
