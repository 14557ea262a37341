//! Whether a run without a request id continues the generation that was seen last.
//!
//! Anonymous clients share one slot. A run is served from it only if everything that can be seen speaks for the same
//! generation: the same conditioning, latents that continue the last ones, and no other unfinished generation that
//! they might continue instead. In doubt the answer is no: that costs speed, and a wrong yes would mix two images.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::{Arc, LazyLock};

use half::{bf16, f16};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::{StateError, list};

/// Latents whose relative distance to the last ones is at least this do not continue them. Independent noise is at
/// √2 ≈ 1.41; one step of a 10-step schedule moves about 0.13, a whole generation about 1.
pub(super) const CONTINUES: f64 = 0.9;

/// Generations that start from one image (image-to-image) resemble one another whatever their noise. For those the bound
/// follows the schedule: a step over the part `p` of the range of timesteps moves latents by at most about 3.5·p (a
/// linear β schedule, where it is steepest).
pub(super) fn reach_of_step(part: f64) -> f64 {
    (0.15 + 5.0 * part).min(CONTINUES)
}

/// Latents must be this much nearer to the slot's than to those of any other unfinished generation. One step moves all
/// generations of a schedule the same way, from their noise toward their image; to pass for the next step of another
/// one, two generations of one seed would have to differ along just that direction. Those that differ in their guidance
/// scale stay near each other for some steps, and count as ambiguous.
const CLEARLY_NEARER: f64 = 0.4;

/// A run that is not served is taken to continue the generation it is this much nearer to than to any other. Successive
/// states of one generation are at about 1 : 2.
const NEARER: f64 = 0.6;

/// Unfinished generations that are remembered.
const STRANDS: usize = 16;

/// An unfinished generation that has not had a run while others had as many as this many generations have is over.
const GENERATIONS_OF_PATIENCE: u64 = 4;

/// Elements of the latents that are compared.
const SAMPLES: usize = 4096;

/// Tensors up to this size are hashed whole, larger ones in [`BLOCKS`] evenly spaced blocks that add up to it.
/// Hashing 8 MiB takes about a millisecond.
const HASHED_BYTES: usize = 8 << 20;
const BLOCKS: usize = 128;

/// After this many changes in a row an input that moves every step is no conditioning.
const CHANGES_TO_LEARN: u32 = 2;

/// A tensor that is fed to the model.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    pub dims: &'a [usize],
    /// Tells element types apart.
    pub element: u32,
    /// The memory; `None` if it cannot be read (strings).
    pub bytes: Option<&'a [u8]>,
    pub values: Values<'a>,
}

/// The elements of a tensor, where they are numbers that can be compared.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Other,
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Values::F32(v) => v.len(),
            Values::F64(v) => v.len(),
            Values::F16(v) => v.len(),
            Values::BF16(v) => v.len(),
            Values::Other => 0,
        }
    }

    fn get(&self, index: usize) -> f64 {
        match self {
            Values::F32(v) => f64::from(v[index]),
            Values::F64(v) => v[index],
            Values::F16(v) => v[index].to_f64(),
            Values::BF16(v) => v[index].to_f64(),
            Values::Other => f64::NAN,
        }
    }
}

/// What one run shows of the generation it belongs to.
#[derive(Clone, Debug, PartialEq)]
pub struct Evidence {
    pub conditioning: Vec<Fingerprint>,
    pub latents: Sketch,
}

impl Evidence {
    /// `rows` is the batch: a float input of no more elements may be a schedule that moves with the steps.
    ///
    /// # Errors
    /// If there is no memory for the samples.
    pub fn new(
        latents: Feed<'_>,
        conditioning: &[Feed<'_>],
        rows: usize,
    ) -> Result<Self, StateError> {
        Ok(Evidence {
            conditioning: conditioning
                .iter()
                .map(|feed| Fingerprint::new(feed, rows))
                .collect(),
            latents: Sketch::new(&latents)?,
        })
    }
}

/// Identifies the contents of one conditioning input.
#[derive(Clone, Debug, PartialEq)]
pub struct Fingerprint {
    /// `None` if the contents cannot be read: then it equals nothing, itself included.
    digest: Option<u128>,
    scalars: Option<Vec<f64>>,
}

impl Fingerprint {
    fn new(feed: &Feed<'_>, rows: usize) -> Self {
        let count = feed.values.len();
        let scalars = (1..=rows.max(1))
            .contains(&count)
            .then(|| (0..count).map(|i| feed.values.get(i)).collect());
        Fingerprint {
            digest: digest(feed),
            scalars,
        }
    }

    fn same(&self, other: &Fingerprint) -> bool {
        self.digest.is_some() && self.digest == other.digest
    }

    /// Which way every element moved from `self` to `next`; `None` if they did not all move one way.
    fn direction(&self, next: &Fingerprint) -> Option<std::cmp::Ordering> {
        let (from, to) = (self.scalars.as_ref()?, next.scalars.as_ref()?);
        let mut moves = from.iter().zip(to).map(|(a, b)| b.partial_cmp(a));
        let first = moves.next()??;
        (first.is_ne() && from.len() == to.len() && moves.all(|m| m == Some(first)))
            .then_some(first)
    }
}

/// The latents of one run: enough of them to tell how far apart two runs are.
#[derive(Clone, Debug, PartialEq)]
pub struct Sketch {
    /// Shared: they are remembered in several places.
    samples: Arc<Vec<f32>>,
    digest: Option<u128>,
}

impl Sketch {
    fn new(feed: &Feed<'_>) -> Result<Self, StateError> {
        let len = feed.values.len();
        // A stride prime to the usual powers of two, so that samples do not line up in one channel or column.
        let stride = (len.div_ceil(SAMPLES)).max(1) | 1;
        let mut samples = list("samples of the latents", len.div_ceil(stride))?;
        samples.extend((0..len).step_by(stride).map(|i| feed.values.get(i) as f32));
        Ok(Sketch {
            samples: Arc::new(samples),
            digest: digest(feed),
        })
    }

    fn identical(&self, other: &Sketch) -> bool {
        self.digest.is_some() && self.digest == other.digest
    }

    /// ‖a − b‖ / max(‖a‖, ‖b‖), infinite if they cannot be compared.
    fn distance(&self, other: &Sketch) -> f64 {
        if self.identical(other) {
            return 0.0;
        }
        if self.samples.is_empty() || self.samples.len() != other.samples.len() {
            return f64::INFINITY;
        }
        let (mut apart, mut a2, mut b2) = (0.0, 0.0, 0.0);
        for (&a, &b) in self.samples.iter().zip(&*other.samples) {
            let (a, b) = (f64::from(a), f64::from(b));
            apart += (a - b) * (a - b);
            a2 += a * a;
            b2 += b * b;
        }
        let distance = (apart / f64::max(a2, b2)).sqrt();
        if distance.is_nan() {
            f64::INFINITY
        } else {
            distance
        }
    }
}

/// A hash that clients cannot aim at: its seed changes with every process.
fn digest(feed: &Feed<'_>) -> Option<u128> {
    static SEED: LazyLock<u64> =
        LazyLock::new(|| std::hash::RandomState::new().hash_one("ditfastattn"));
    let bytes = feed.bytes?;
    let mut hash = xxh3_128_with_seed(&[], *SEED);
    let mut mix = |bytes: &[u8]| {
        // Chained: each part is hashed with what came before it.
        let seed = (hash as u64) ^ *SEED;
        hash = hash.rotate_left(1) ^ xxh3_128_with_seed(bytes, seed);
    };
    mix(&feed.element.to_le_bytes());
    for &dim in feed.dims {
        mix(&(dim as u64).to_le_bytes());
    }
    if bytes.len() <= HASHED_BYTES {
        mix(bytes);
    } else {
        let block = HASHED_BYTES / BLOCKS;
        for i in 0..BLOCKS {
            let start = (bytes.len() - block) * i / (BLOCKS - 1);
            mix(&bytes[start..start + block]);
        }
    }
    Some(hash)
}

/// An unfinished generation that is not in the slot.
#[derive(Clone, Debug)]
struct Strand {
    due: usize,
    /// The turn at which it was seen last.
    seen: u64,
    conditioning: Option<Vec<Fingerprint>>,
    latents: Sketch,
}

impl Strand {
    /// Whether its generation may have a run at `place` (`None`: anywhere). Generations go forward, but not every run of
    /// theirs need have come by here; and which of the two runs of a step one was may have been a wrong guess.
    fn may_reach(&self, place: Option<usize>, runs_per_step: usize) -> bool {
        place.is_none_or(|place| self.due / runs_per_step <= place / runs_per_step)
    }
}

/// What is remembered about anonymous runs, besides the caches.
#[derive(Debug)]
pub(super) struct Guard {
    /// The two runs of a step have conditioning of their own. That of one says nothing about the other, so with two
    /// generations that are not in the slot are told apart by their latents only.
    runs_per_step: usize,
    /// Anonymous runs so far.
    turn: u64,
    /// Turns after which a generation that has not come by again is over.
    patience: u64,
    /// Two generations were seen at once: nothing is served until one starts anew.
    pub contested: bool,
    /// Of the slot's generation, per branch, from its last completed run.
    conditioning: [Option<Vec<Fingerprint>>; 2],
    latents: Option<Sketch>,
    strands: VecDeque<Strand>,
    watch: [Watch; 2],
    /// Conditioning inputs that are none: they move with the steps.
    learnt: Vec<bool>,
}

/// Looks for inputs that change at every step.
#[derive(Debug, Default)]
struct Watch {
    last: Option<(usize, Evidence)>,
    /// Per input, the direction of its changes and how many there were in a row.
    runs: Vec<Option<(std::cmp::Ordering, u32)>>,
}

impl Guard {
    /// `runs` is the length of a whole generation.
    pub fn new(runs_per_step: usize, runs: usize) -> Self {
        Guard {
            runs_per_step,
            turn: 0,
            patience: GENERATIONS_OF_PATIENCE * runs.max(STRANDS) as u64,
            contested: false,
            conditioning: [None, None],
            latents: None,
            strands: VecDeque::new(),
            watch: [Watch::default(), Watch::default()],
            learnt: Vec::new(),
        }
    }

    /// The slot's generation ends here and another begins. If it has runs to come, `due` is the next one's place.
    pub fn begin(&mut self, due: Option<usize>, branch_of_due: usize) {
        if let (false, Some(due), Some(latents)) = (self.contested, due, self.latents.take()) {
            let conditioning = self.conditioning[branch_of_due].take();
            self.remember(Strand {
                due,
                seen: self.turn,
                conditioning,
                latents,
            });
        }
        self.contested = false;
        self.conditioning = [None, None];
        self.latents = None;
    }

    /// Nobody has come by for long: everything but what was learnt of the model is forgotten.
    pub fn forget(&mut self) {
        let learnt = std::mem::take(&mut self.learnt);
        let patience = self.patience;
        *self = Guard {
            patience,
            learnt,
            ..Guard::new(self.runs_per_step, 0)
        };
    }

    /// The slot cannot be trusted any more.
    pub fn contest(&mut self, due: Option<usize>, branch_of_due: usize) {
        self.begin(due, branch_of_due);
        self.contested = true;
    }

    /// A run of the slot's generation has completed.
    pub fn advance(&mut self, branch: usize, evidence: Evidence) {
        self.conditioning[branch] = Some(evidence.conditioning);
        self.latents = Some(evidence.latents);
    }

    /// A run that was not served has come by, at `place` if that is certain. Its generation goes on at `due`, if at all.
    /// `in_flight` is the run that owns the slot at the moment.
    pub fn note(
        &mut self,
        place: Option<usize>,
        due: Option<usize>,
        evidence: &Evidence,
        in_flight: Option<&Evidence>,
    ) {
        let strands = self
            .strands
            .iter()
            .enumerate()
            .filter(|(_, strand)| strand.may_reach(place, self.runs_per_step))
            .filter(|(_, strand)| self.fits(strand.conditioning.as_deref(), evidence))
            .map(|(i, strand)| (Some(i), &strand.latents));
        // It may as well continue the slot.
        let slot = self.latents.iter().chain(in_flight.map(|run| &run.latents));
        let mut near: Vec<(Option<usize>, f64)> = strands
            .chain(slot.map(|latents| (None, latents)))
            .map(|(i, latents)| (i, latents.distance(&evidence.latents)))
            .filter(|(_, distance)| *distance < CONTINUES)
            .collect();
        near.sort_by(|a, b| a.1.total_cmp(&b.1));
        // The strand that it clearly continues is no longer where it was. In doubt all stay.
        match near[..] {
            [(Some(index), _)] => drop(self.strands.remove(index)),
            [(Some(index), nearest), (_, next), ..] if nearest < NEARER * next => {
                drop(self.strands.remove(index));
            }
            _ => {}
        }
        if let Some(due) = due {
            self.remember(Strand {
                due,
                seen: self.turn,
                conditioning: Some(evidence.conditioning.clone()),
                latents: evidence.latents.clone(),
            });
        }
    }

    /// The run that was noted last with this evidence is in the slot after all.
    pub fn recall(&mut self, evidence: &Evidence) {
        let noted = self
            .strands
            .iter()
            .rposition(|strand| strand.latents == evidence.latents);
        if let Some(index) = noted {
            self.strands.remove(index);
        }
    }

    fn remember(&mut self, mut strand: Strand) {
        if self.runs_per_step > 1 {
            strand.conditioning = None;
        }
        if self.strands.len() == STRANDS {
            self.strands.pop_front();
        }
        self.strands.push_back(strand);
    }

    /// Whether a run of `branch` continues the slot's generation and no other. Others are told apart by their place
    /// too, if places are certain. `reach` bounds how far the latents may have moved.
    pub fn continues(
        &self,
        place: Option<usize>,
        branch: usize,
        reach: f64,
        evidence: &Evidence,
    ) -> bool {
        let Some(latents) = &self.latents else {
            return false;
        };
        if branch == 1 && !self.same_step(evidence) {
            return false;
        }
        // The second run of the first step shows its conditioning for the first time.
        if self.conditioning[branch].is_none() && branch == 0 {
            return false;
        }
        if !self.fits(self.conditioning[branch].as_deref(), evidence) {
            return false;
        }
        let own = latents.distance(&evidence.latents);
        own < reach
            && self
                .strands
                .iter()
                .filter(|strand| strand.may_reach(place, self.runs_per_step))
                .filter(|strand| self.fits(strand.conditioning.as_deref(), evidence))
                // One that stands exactly where the slot stands would find the same caches.
                .filter(|strand| !strand.latents.identical(latents))
                .map(|strand| strand.latents.distance(&evidence.latents))
                .all(|other| match place {
                    Some(_) => own < CLEARLY_NEARER * other,
                    // The slot may have gone a step further than the other one: its next run would look like the
                    // slot's own. Only places could tell.
                    None => other >= CONTINUES,
                })
    }

    /// Whether this could be the second run of the step that the slot has seen the first run of: guidance feeds both
    /// the same latents.
    pub fn same_step(&self, evidence: &Evidence) -> bool {
        self.latents
            .as_ref()
            .is_some_and(|latents| latents.identical(&evidence.latents))
    }

    /// Whether the conditioning of `branch` has been seen, and can vouch for a run of that branch.
    pub fn knows(&self, branch: usize) -> bool {
        self.conditioning[branch].is_some()
    }

    /// Unknown conditioning fits everything.
    fn fits(&self, known: Option<&[Fingerprint]>, evidence: &Evidence) -> bool {
        let Some(known) = known else { return true };
        known.len() == evidence.conditioning.len()
            && known
                .iter()
                .zip(&evidence.conditioning)
                .enumerate()
                .all(|(i, (a, b))| a.same(b) || self.is_learnt(i))
    }

    fn is_learnt(&self, input: usize) -> bool {
        self.learnt.get(input).copied().unwrap_or(false)
    }

    /// Learns which inputs move with the steps. To be shown every anonymous run, served or not.
    pub fn watch(&mut self, step: usize, branch: usize, evidence: &Evidence) {
        self.turn += 1;
        let (turn, patience) = (self.turn, self.patience);
        self.strands.retain(|strand| turn - strand.seen <= patience);
        let count = evidence.conditioning.len();
        self.learnt.resize(count, false);
        let (learnt_before, mut learnt_now) = (self.learnt.clone(), false);
        let learnt = &mut self.learnt;
        let watch = &mut self.watch[branch];
        watch.runs.resize(count, None);
        let last = watch.last.replace((step, evidence.clone()));
        let follows = last.filter(|(last_step, last)| {
            last_step + 1 == step
                && last.conditioning.len() == count
                && last.latents.distance(&evidence.latents) < CONTINUES
                && last
                    .conditioning
                    .iter()
                    .zip(&evidence.conditioning)
                    .enumerate()
                    .all(|(i, (a, b))| a.same(b) || learnt[i] || a.direction(b).is_some())
        });
        let Some((_, last)) = follows else {
            watch.runs.fill(None);
            return;
        };
        for (i, run) in watch.runs.iter_mut().enumerate() {
            *run = last.conditioning[i]
                .direction(&evidence.conditioning[i])
                .map(|direction| match *run {
                    Some((same, times)) if same == direction => (direction, times + 1),
                    _ => (direction, 1),
                });
            if run.is_some_and(|(_, times)| times >= CHANGES_TO_LEARN) && !learnt[i] {
                learnt[i] = true;
                learnt_now = true;
            }
        }
        if learnt_now {
            // Until now every run of this generation looked like another one. What it left under those names is its own.
            let before = std::mem::replace(&mut self.learnt, learnt_before);
            let mut strands = std::mem::take(&mut self.strands);
            let differs = |strand: &Strand| !self.fits(strand.conditioning.as_deref(), evidence);
            let other: Vec<bool> = strands.iter().map(differs).collect();
            self.learnt = before;
            let mut other = other.into_iter();
            strands.retain(|strand| {
                let differed = other.next().unwrap_or(false);
                !(differed && self.fits(strand.conditioning.as_deref(), evidence))
            });
            self.strands = strands;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    fn evidence_of(latents: &[f32], conditioning: &[Vec<f32>], rows: usize) -> Evidence {
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
        Evidence::new(latents, &feeds, rows).expect("memory")
    }

    fn toward(from: &[f32], to: &[f32], part: f32) -> Vec<f32> {
        from.iter()
            .zip(to)
            .map(|(a, b)| a + part * (b - a))
            .collect()
    }

    fn slot(evidence: Evidence) -> Guard {
        let mut guard = Guard::new(1, 20);
        guard.begin(None, 0);
        guard.advance(0, evidence);
        guard
    }

    #[test]
    fn the_next_latents_of_a_generation_continue_it_and_other_noise_does_not() {
        let (a, b, image) = (noise(1, 5000), noise(2, 5000), noise(3, 5000));
        let prompt = vec![noise(4, 64)];
        let guard = slot(evidence_of(&a, &prompt, 2));
        let next = toward(&a, &image, 0.1);
        assert!(guard.continues(Some(1), 0, CONTINUES, &evidence_of(&next, &prompt, 2)));
        assert!(!guard.continues(Some(1), 0, CONTINUES, &evidence_of(&b, &prompt, 2)));
    }

    #[test]
    fn another_prompt_is_another_generation() {
        let a = noise(1, 5000);
        let guard = slot(evidence_of(&a, &[noise(4, 64)], 2));
        assert!(!guard.continues(Some(1), 0, CONTINUES, &evidence_of(&a, &[noise(5, 64)], 2)));
        let mut changed = noise(4, 64);
        changed[63] += 1e-6;
        assert!(!guard.continues(Some(1), 0, CONTINUES, &evidence_of(&a, &[changed], 2)));
    }

    #[test]
    fn latents_near_two_generations_continue_neither() {
        let (a, image) = (noise(1, 5000), noise(3, 5000));
        // The same seed with a slightly different guidance scale: a hair apart after one step.
        let one = toward(&a, &image, 0.10);
        let two = toward(&a, &image, 0.11);
        let mut guard = slot(evidence_of(&one, &[], 2));
        guard.begin(Some(2), 0);
        guard.advance(0, evidence_of(&two, &[], 2));
        assert!(!guard.continues(
            Some(2),
            0,
            CONTINUES,
            &evidence_of(&toward(&one, &image, 0.1), &[], 2)
        ));
        assert!(!guard.continues(
            Some(2),
            0,
            CONTINUES,
            &evidence_of(&toward(&two, &image, 0.1), &[], 2)
        ));
    }

    #[test]
    fn an_abandoned_generation_of_other_noise_is_no_obstacle() {
        let (a, b, image) = (noise(1, 5000), noise(2, 5000), noise(3, 5000));
        let mut guard = slot(evidence_of(&a, &[], 2));
        guard.begin(Some(1), 0);
        guard.advance(0, evidence_of(&b, &[], 2));
        assert!(guard.continues(
            Some(1),
            0,
            CONTINUES,
            &evidence_of(&toward(&b, &image, 0.1), &[], 2)
        ));
        assert!(!guard.continues(
            Some(1),
            0,
            CONTINUES,
            &evidence_of(&toward(&a, &image, 0.1), &[], 2)
        ));
    }

    #[test]
    fn starting_the_same_generation_again_is_no_obstacle() {
        let (a, image) = (noise(1, 5000), noise(3, 5000));
        let mut guard = slot(evidence_of(&a, &[], 2));
        guard.begin(Some(1), 0);
        guard.advance(0, evidence_of(&a, &[], 2));
        assert!(guard.continues(
            Some(1),
            0,
            CONTINUES,
            &evidence_of(&toward(&a, &image, 0.1), &[], 2)
        ));
    }

    #[test]
    fn unreadable_and_non_finite_inputs_are_never_trusted() {
        let a = noise(1, 100);
        let mut broken = a.clone();
        broken[0] = f32::NAN;
        let guard = slot(evidence_of(&a, &[], 2));
        assert!(!guard.continues(Some(1), 0, CONTINUES, &evidence_of(&broken, &[], 2)));
        let mut strings = evidence_of(&a, &[], 2);
        strings.conditioning.push(Fingerprint {
            digest: None,
            scalars: None,
        });
        let guard = slot(strings.clone());
        assert!(!guard.continues(Some(1), 0, CONTINUES, &strings));
    }

    #[test]
    fn a_second_sigma_is_learnt_after_two_changes() {
        let (a, image) = (noise(1, 5000), noise(3, 5000));
        let at = |step: usize, sigma: f32| {
            evidence_of(
                &toward(&a, &image, 0.1 * step as f32),
                &[vec![sigma, sigma]],
                2,
            )
        };
        let mut guard = Guard::new(1, 20);
        guard.watch(0, 0, &at(0, 1.0));
        guard.watch(1, 0, &at(1, 0.9));
        let mut fresh = slot(at(0, 1.0));
        fresh.learnt = guard.learnt.clone();
        assert!(
            !fresh.continues(Some(1), 0, CONTINUES, &at(1, 0.9)),
            "one change is not enough"
        );
        guard.watch(2, 0, &at(2, 0.8));
        fresh.learnt = guard.learnt.clone();
        assert!(fresh.continues(Some(1), 0, CONTINUES, &at(1, 0.9)));
    }

    #[test]
    fn guidance_that_differs_between_users_is_not_learnt() {
        let (a, b, image) = (noise(1, 5000), noise(2, 5000), noise(3, 5000));
        let mut guard = Guard::new(1, 20);
        for step in 0..8 {
            let (from, scale) = if step % 2 == 0 { (&a, 3.5) } else { (&b, 7.0) };
            let latents = toward(from, &image, 0.1 * step as f32);
            guard.watch(step, 0, &evidence_of(&latents, &[vec![scale]], 1));
        }
        assert_eq!(guard.learnt, [false]);
        // Too many elements for a schedule: a tensor of the batch.
        for step in 0..8 {
            let latents = toward(&a, &image, 0.1 * step as f32);
            guard.watch(step, 0, &evidence_of(&latents, &[vec![step as f32; 3]], 2));
        }
        assert_eq!(guard.learnt, [false]);
    }

    #[test]
    fn every_byte_of_a_large_input_counts_up_to_the_limit() {
        let len = 3 << 20;
        let mut bytes = vec![7u8; len];
        let whole = |bytes: &[u8]| {
            digest(&Feed {
                dims: &[bytes.len()],
                element: 2,
                bytes: Some(bytes),
                values: Values::Other,
            })
        };
        let before = whole(&bytes);
        for at in [0, 1, len / 2, len - 1] {
            bytes[at] ^= 1;
            assert_ne!(whole(&bytes), before, "byte {at}");
            bytes[at] ^= 1;
        }
        assert_eq!(whole(&bytes), before);
    }
}
