//! The metrics, on outputs whose losses can be worked out by hand.

use ditfastattn_plans::Metric::{self, Authors, Cosine, Mrae, Mse};
use proptest::prelude::*;

fn loss(metric: Metric, a: &[f32], b: &[f32]) -> Option<f64> {
    metric.loss(&[a], &[b]).unwrap()
}

fn near(found: Option<f64>, expected: f64) {
    let found = found.expect("a finite loss");
    assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
}

#[test]
fn values_worked_out_by_hand() {
    let (a, b) = ([1.0, -2.0, 0.0, 4.0], [2.0, -1.0, 0.0, -4.0]);
    near(loss(Mrae, &a, &b), (0.5 + 0.5 + 0.0 + 2.0) / 4.0);
    // The signed maximum divides −2 and −1 by the smaller magnitude, and 4 and −4 by 4.
    near(loss(Authors, &a, &b), (0.5 + 1.0 + 0.0 + 2.0) / 4.0);
    near(loss(Mse, &a, &b), (1.0 + 1.0 + 64.0) / 21.0);
    near(loss(Cosine, &a, &b), 1.0 + 12.0 / 21.0);
}

#[test]
fn zeros() {
    for metric in Metric::ALL {
        assert_eq!(
            loss(metric, &[0.0, -0.0], &[0.0, 0.0]),
            Some(0.0),
            "{metric}"
        );
        assert_eq!(loss(metric, &[], &[]), Some(0.0), "{metric}");
    }
    near(loss(Mrae, &[0.0], &[1e-30]), 1.0);
    near(loss(Cosine, &[0.0], &[1.0]), 1.0);
    assert_eq!(loss(Mse, &[0.0], &[1.0]), None, "infinitely far");
    // A sign flip around zero is clipped at 10.
    near(loss(Authors, &[-1.0], &[0.0]), 10.0);
}

#[test]
fn what_is_not_finite_has_no_loss() {
    for metric in Metric::ALL {
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(loss(metric, &[1.0, 1.0], &[1.0, wrong]), None, "{metric}");
            assert_eq!(loss(metric, &[wrong, 1.0], &[wrong, 1.0]), None, "{metric}");
        }
    }
}

#[test]
fn samples_are_averaged_and_must_match() {
    let reference = [vec![1.0f32], vec![1.0]];
    let found = [vec![1.0f32], vec![2.0]];
    near(Mrae.loss(&reference, &found).unwrap(), 0.25);
    let error = Mrae.loss(&reference, &found[..1]).unwrap_err();
    assert_eq!((error.expected, error.found), (2, 1));
    let error = Mrae.loss(&reference, &[vec![1.0f32], vec![]]).unwrap_err();
    assert_eq!(error.what, "elements in sample 1");
}

#[test]
fn names_survive_a_round_trip() {
    for metric in Metric::ALL {
        assert_eq!(metric.to_string().parse(), Ok(metric));
    }
    assert!("MSE".parse::<Metric>().is_err());
}

proptest! {
    #[test]
    fn equal_outputs_have_no_loss_and_others_have_some(
        a in prop::collection::vec(-1e30f32..1e30, 1..40), b in prop::collection::vec(-1e30f32..1e30, 40),
    ) {
        let b = &b[..a.len()];
        for metric in Metric::ALL {
            prop_assert_eq!(loss(metric, &a, &a), Some(0.0));
            if let Some(loss) = loss(metric, &a, b) {
                prop_assert!(loss >= 0.0);
                prop_assert!(metric != Authors || loss <= 10.0);
                prop_assert!(!matches!(metric, Mrae | Cosine) || loss <= 2.0);
            }
        }
    }
}
