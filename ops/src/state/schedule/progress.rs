//! Where a run stands in the plan, and where its generation has come to.

use std::cmp::Ordering;

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanPosition {
    At(usize),
    /// The plan says nothing about this timestep: not in its list, or beyond its last step.
    OffPlan,
}

/// Where a run stands in the plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct At {
    pub place: usize,
    /// The timestep.
    pub value: f64,
}

/// What the runs of a generation looked like so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Place of the last run that completed.
    pub place: Option<usize>,
    /// Place at which the generation started: not 0 for image-to-image.
    pub first_place: Option<usize>,
    pub(super) first_value: Option<f64>,
    pub(super) last_value: Option<f64>,
    pub(super) direction: Option<Ordering>,
}

impl Progress {
    /// Of a generation that started at `first_place` and is taken up again.
    pub fn resumed(first_place: usize) -> Self {
        Progress {
            first_place: Some(first_place),
            ..Progress::default()
        }
    }

    /// The run at `place` with timestep `value` has completed.
    pub fn advance(&mut self, place: usize, value: f64) {
        self.place = Some(place);
        self.first_place.get_or_insert(place);
        self.observe(value);
    }

    /// A run with timestep `value` was seen, whatever its place: later starts are recognised by it.
    pub fn observe(&mut self, value: f64) {
        self.first_value.get_or_insert(value);
        if let Some(last) = self.last_value
            && self.direction.is_none()
            && value != last
        {
            self.direction = value.partial_cmp(&last);
        }
        self.last_value = Some(value);
    }
}
