use std::sync::Arc;

use super::*;
use crate::state::schedule::{At, Schedule, SchedulePolicy};

/// A plan of 20 steps, from 1000 down to 50.
fn tracker() -> ContinuityTracker {
    let list: Vec<f64> = (0..20).map(|i| 1000.0 - 50.0 * f64::from(i)).collect();
    ContinuityTracker::new(Arc::new(Schedule::new(
        Some(&list),
        20,
        1,
        SchedulePolicy::Planned,
    )))
}

fn at(place: usize) -> At {
    At {
        place,
        value: 1000.0 - 50.0 * place as f64,
    }
}

/// Deterministic noise in [-1, 1).
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn feed(values: &[f32]) -> Feed<'_> {
    Feed {
        dims: &[],
        element: 1,
        bytes: None,
        values: Values::F32(values),
    }
}

fn signature_of(latents: &[f32], conditioning: &[Vec<f32>], rows: usize) -> RunSignature {
    let bytes =
        |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let latent_bytes = bytes(latents);
    let conditioning_bytes: Vec<Vec<u8>> = conditioning.iter().map(|c| bytes(c)).collect();
    let feeds: Vec<Feed<'_>> = conditioning
        .iter()
        .zip(&conditioning_bytes)
        .map(|(values, bytes)| Feed {
            bytes: Some(bytes),
            ..feed(values)
        })
        .collect();
    let latents = Feed {
        bytes: Some(&latent_bytes),
        ..feed(latents)
    };
    RunSignature::new(latents, &feeds, rows).expect("memory")
}

fn toward(from: &[f32], to: &[f32], part: f32) -> Vec<f32> {
    from.iter()
        .zip(to)
        .map(|(a, b)| a + part * (b - a))
        .collect()
}

fn slot(signature: RunSignature) -> ContinuityTracker {
    let mut tracker = tracker();
    tracker.begin();
    tracker.advance(at(0), 0, signature);
    tracker
}

#[test]
fn the_next_latents_of_a_generation_continue_it_and_other_noise_does_not() {
    let (a, b, image) = (noise(1, 5000), noise(2, 5000), noise(3, 5000));
    let prompt = vec![noise(4, 64)];
    let tracker = slot(signature_of(&a, &prompt, 2));
    let next = toward(&a, &image, 0.1);
    assert!(tracker.continues(at(1), &signature_of(&next, &prompt, 2)));
    assert!(!tracker.continues(at(1), &signature_of(&b, &prompt, 2)));
}

#[test]
fn another_prompt_is_another_generation() {
    let a = noise(1, 5000);
    let tracker = slot(signature_of(&a, &[noise(4, 64)], 2));
    assert!(!tracker.continues(at(1), &signature_of(&a, &[noise(5, 64)], 2)));
    let mut changed = noise(4, 64);
    changed[63] += 1e-6;
    assert!(!tracker.continues(at(1), &signature_of(&a, &[changed], 2)));
}

#[test]
fn latents_near_two_generations_continue_neither() {
    let (a, image) = (noise(1, 5000), noise(3, 5000));
    // The same seed with a slightly different guidance scale: a hair apart after one step.
    let one = toward(&a, &image, 0.10);
    let two = toward(&a, &image, 0.11);
    let mut tracker = tracker();
    tracker.advance(at(1), 0, signature_of(&one, &[], 2));
    tracker.begin();
    tracker.advance(at(1), 0, signature_of(&two, &[], 2));
    assert!(!tracker.continues(at(2), &signature_of(&toward(&one, &image, 0.1), &[], 2)));
    assert!(!tracker.continues(at(2), &signature_of(&toward(&two, &image, 0.1), &[], 2)));
}

#[test]
fn an_abandoned_generation_of_other_noise_is_no_obstacle() {
    let (a, b, image) = (noise(1, 5000), noise(2, 5000), noise(3, 5000));
    let mut tracker = slot(signature_of(&a, &[], 2));
    tracker.begin();
    tracker.advance(at(0), 0, signature_of(&b, &[], 2));
    assert!(tracker.continues(at(1), &signature_of(&toward(&b, &image, 0.1), &[], 2)));
    assert!(!tracker.continues(at(1), &signature_of(&toward(&a, &image, 0.1), &[], 2)));
}

#[test]
fn starting_the_same_generation_again_is_no_obstacle() {
    let (a, image) = (noise(1, 5000), noise(3, 5000));
    let mut tracker = slot(signature_of(&a, &[], 2));
    tracker.begin();
    tracker.advance(at(0), 0, signature_of(&a, &[], 2));
    assert!(tracker.continues(at(1), &signature_of(&toward(&a, &image, 0.1), &[], 2)));
}

#[test]
fn unreadable_and_non_finite_inputs_are_never_trusted() {
    let a = noise(1, 100);
    let mut broken = a.clone();
    broken[0] = f32::NAN;
    let tracker = slot(signature_of(&a, &[], 2));
    assert!(!tracker.continues(at(1), &signature_of(&broken, &[], 2)));
    let mut strings = signature_of(&a, &[], 2);
    strings.conditioning.push(InputDigest {
        digest: None,
        scalars: None,
    });
    let tracker = slot(strings.clone());
    assert!(!tracker.continues(at(1), &strings));
}

#[test]
fn a_schedule_is_learnt_after_two_changes_for_the_next_generation() {
    let (a, image) = (noise(1, 5000), noise(3, 5000));
    let shown = |step: usize, sigma: f32| {
        signature_of(
            &toward(&a, &image, 0.1 * step as f32),
            &[vec![sigma, sigma]],
            2,
        )
    };
    let mut tracker = slot(shown(0, 1.0));
    tracker.observe(at(0), &shown(0, 1.0));
    tracker.observe(at(1), &shown(1, 0.9));
    assert!(
        !tracker.continues(at(1), &shown(1, 0.9)),
        "one change is not enough"
    );
    tracker.observe(at(2), &shown(2, 0.8));
    assert_eq!(tracker.schedule_inputs.detected(), [true]);
    assert!(tracker.slot.is_none(), "what it left before is forgotten");
    tracker.advance(at(0), 0, shown(0, 1.0));
    assert!(tracker.continues(at(1), &shown(1, 0.9)));
    assert!(
        !tracker.continues(at(1), &shown(1, 0.91)),
        "what it was at this timestep, and nothing else"
    );
    // The run at hand does not vouch for itself.
    tracker.advance(at(2), 0, shown(2, 0.8));
    tracker.observe(at(3), &shown(3, 0.75));
    assert!(!tracker.continues(at(3), &shown(3, 0.75)));
    tracker.observe(at(4), &shown(4, 0.7));
    assert!(tracker.continues(at(3), &shown(3, 0.75)));
}

#[test]
fn the_neighbouring_timestep_is_known_at_once() {
    let (a, image) = (noise(1, 5000), noise(3, 5000));
    let shown = |step: usize, next: f32| {
        signature_of(
            &toward(&a, &image, 0.1 * step as f32),
            &[vec![next, next]],
            2,
        )
    };
    let tracker = slot(shown(0, 950.0));
    assert!(tracker.continues(at(1), &shown(1, 900.0)));
    assert!(!tracker.continues(at(1), &shown(1, 850.0)));
    let mut late = self::tracker();
    late.advance(at(18), 0, shown(18, 50.0));
    assert!(
        late.continues(at(19), &shown(19, 0.0)),
        "beyond the last one there is none"
    );
    assert!(!late.continues(at(19), &shown(19, 100.0)));
    // The timestep before.
    let tracker = slot(shown(0, 1000.0));
    assert!(tracker.continues(at(1), &shown(1, 1000.0)));
    let mut tracker = self::tracker();
    tracker.advance(at(1), 0, shown(1, 1000.0));
    assert!(tracker.continues(at(2), &shown(2, 950.0)));
}

#[test]
fn guidance_that_differs_between_users_is_not_learnt() {
    let (a, b, image) = (noise(1, 5000), noise(2, 5000), noise(3, 5000));
    let mut tracker = tracker();
    for step in 0..8 {
        let (from, scale) = if step % 2 == 0 { (&a, 3.5) } else { (&b, 7.0) };
        let latents = toward(from, &image, 0.1 * step as f32);
        tracker.observe(at(step), &signature_of(&latents, &[vec![scale]], 1));
    }
    assert_eq!(tracker.schedule_inputs.detected(), [false]);
    // Too many elements for a schedule: a tensor of the batch.
    for step in 0..8 {
        let latents = toward(&a, &image, 0.1 * step as f32);
        tracker.observe(
            at(step),
            &signature_of(&latents, &[vec![step as f32; 3]], 2),
        );
    }
    assert_eq!(tracker.schedule_inputs.detected(), [false]);
}
