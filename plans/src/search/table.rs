//! The losses of a search: its state while it runs, its record afterwards.
//!
//! Layer-steps ("cells") are decided in one order, step by step and layer by layer, so a table is
//! a list. Which of its losses another δ may use is decided here too.

use std::fmt;

use super::settings::InvalidSettings;
use crate::{Action, Plan, Settings};

/// A candidate that was tried, and its loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tried {
    /// The candidate.
    pub action: Action,
    /// Its loss on the final output; `None` where that was no finite number.
    pub loss: Option<f64>,
}

/// One decided layer-step. Those of step 0 are always `full` and are not recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// The step, from 1.
    pub step: usize,
    /// The layer, from 0.
    pub layer: usize,
    /// What the layer will do: the last candidate tried, or `full` if none passed.
    pub action: Action,
    /// All candidates that were tried, in order.
    pub tried: Vec<Tried>,
}

/// A search as far as it has come: its settings and every decided layer-step with all losses.
#[derive(Clone, Debug, PartialEq)]
pub struct LossTable {
    settings: Settings,
    cells: Vec<Cell>,
    /// Losses that are already known of the next cell, a prefix of its candidates.
    known: Vec<Tried>,
}

/// What a table says about another δ; from [`LossTable::rederive`].
#[derive(Clone, Debug, PartialEq)]
pub struct Rederived {
    /// The table of the search with the new δ, as far as it is known: exactly the cells that this
    /// search would record. [`search`](crate::search()) goes on from it.
    pub table: LossTable,
    /// The first (step, layer) that has to be searched; `None` if all are known.
    pub valid_until: Option<(usize, usize)>,
    /// The first (step, layer) that is decided differently than with the old δ. Everything after
    /// it runs on another trajectory.
    pub differs_at: Option<(usize, usize)>,
}

impl LossTable {
    /// A search that has not begun.
    ///
    /// # Errors
    ///
    /// When [`Settings::validate`] refuses the settings.
    pub fn new(settings: Settings) -> Result<LossTable, InvalidSettings> {
        settings.validate()?;
        Ok(LossTable {
            settings,
            cells: Vec::new(),
            known: Vec::new(),
        })
    }

    /// What determines the search.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The decided layer-steps, in order.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Layer-steps that the search decides: all but those of step 0.
    pub fn cell_count(&self) -> usize {
        (self.settings.steps - 1) * self.settings.layers()
    }

    /// The (step, layer) that is decided next; `None` if the search is done.
    pub fn next(&self) -> Option<(usize, usize)> {
        (self.cells.len() < self.cell_count()).then(|| self.place(self.cells.len()))
    }

    /// Every layer-step is decided.
    pub fn is_complete(&self) -> bool {
        self.next().is_none()
    }

    /// Candidates that were tried.
    pub fn trials(&self) -> usize {
        self.cells.iter().map(|cell| cell.tried.len()).sum()
    }

    /// The forward passes that deciding these cells takes at one for each dense run, trial and
    /// committed step, however often the search was interrupted ([`Effort`](crate::Effort) has
    /// what one process really ran).
    pub fn naive_forwards(&self) -> f64 {
        let layers = self.settings.layers();
        let begun = self.cells.len().div_ceil(layers);
        let committed = 1 + self.cells.len() / layers;
        (begun + self.trials() + committed) as f64
    }

    /// The plan of the cells decided so far; layer-steps that are not decided are `full`. It has
    /// no name.
    pub fn plan(&self) -> Plan {
        let settings = &self.settings;
        let mut plan = Plan {
            delta: Some(settings.delta),
            window: settings.window,
            cfg: settings.cfg,
            timesteps: settings.timesteps.clone(),
            text: settings.text,
            model: settings.model,
            ..Plan::all_full(settings.layers(), settings.steps)
        };
        for cell in &self.cells {
            plan.steps[cell.step][cell.layer] = cell.action;
        }
        plan
    }

    /// What is known about the search with another δ and otherwise the same settings.
    ///
    /// Cells are exact up to and including the first one that is decided differently: until there
    /// both searches have seen the same runs. From the next cell on earlier choices differ, and
    /// with them every activation. A cell whose recorded candidate no longer passes is where the
    /// search has to go on, with the candidates that were not tried; the losses it has are kept.
    ///
    /// # Errors
    ///
    /// When `delta` is not a finite number from 0.
    pub fn rederive(&self, delta: f64) -> Result<Rederived, InvalidSettings> {
        let settings = Settings {
            delta,
            ..self.settings.clone()
        };
        let mut table = LossTable::new(settings)?;
        let mut differs_at = None;
        table.known = self.known.clone();
        for cell in &self.cells {
            let threshold = table.settings.threshold(cell.layer);
            let passed = cell
                .tried
                .iter()
                .position(|tried| passes(tried.loss, threshold));
            let tried = &cell.tried[..passed.map_or(cell.tried.len(), |i| i + 1)];
            let untried = tried.len() < table.settings.candidates[cell.layer].len();
            if passed.is_none() && untried {
                table.known = tried.to_vec();
                break;
            }
            let action = passed.map_or(Action::Full, |i| tried[i].action);
            let tried = tried.to_vec();
            table.cells.push(Cell {
                action,
                tried,
                ..*cell
            });
            if action != cell.action {
                differs_at = Some((cell.step, cell.layer));
                table.known.clear();
                break;
            }
        }
        let valid_until = table.next();
        Ok(Rederived {
            table,
            valid_until,
            differs_at,
        })
    }

    /// The (step, layer) of the cell with this index.
    pub(super) fn place(&self, index: usize) -> (usize, usize) {
        let layers = self.settings.layers();
        (1 + index / layers, index % layers)
    }

    /// The actions decided so far of the next cell's step.
    pub(super) fn prefix(&self) -> Vec<Action> {
        let decided = self.cells.len() % self.settings.layers();
        let cells = &self.cells[self.cells.len() - decided..];
        cells.iter().map(|cell| cell.action).collect()
    }

    pub(super) fn take_known(&mut self) -> Vec<Tried> {
        std::mem::take(&mut self.known)
    }

    /// Appends the next cell.
    ///
    /// # Errors
    ///
    /// Says what about the cell cannot have come from this search.
    pub(super) fn push(&mut self, cell: Cell) -> Result<(), String> {
        let expected = self
            .next()
            .ok_or("the search is complete, but another cell follows".to_owned())?;
        if (cell.step, cell.layer) != expected {
            let (step, layer) = expected;
            return Err(format!(
                "expected step {step}, layer {layer}, found step {}, layer {}",
                cell.step, cell.layer
            ));
        }
        let candidates = &self.settings.candidates[cell.layer];
        let in_order = cell.tried.len() <= candidates.len()
            && cell
                .tried
                .iter()
                .zip(candidates)
                .all(|(t, c)| t.action == *c);
        if !in_order {
            return Err(
                "the candidates tried are not those of the header, in its order".to_owned(),
            );
        }
        let threshold = self.settings.threshold(cell.layer);
        let passed = cell
            .tried
            .iter()
            .position(|tried| passes(tried.loss, threshold));
        let (action, tried) = match passed {
            Some(i) => (candidates[i], i + 1),
            None => (Action::Full, candidates.len()),
        };
        if (cell.action, cell.tried.len()) != (action, tried) {
            return Err(format!(
                "its losses under the threshold {threshold} make it {action} after {tried} candidates, found {} after {}",
                cell.action,
                cell.tried.len()
            ));
        }
        self.cells.push(cell);
        self.known.clear();
        Ok(())
    }
}

/// A candidate passes if its loss is *below* the threshold: δ = 0 leaves every layer full.
pub(super) fn passes(loss: Option<f64>, threshold: f64) -> bool {
    loss.is_some_and(|loss| loss < threshold)
}

impl fmt::Display for Rederived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (known, all) = (self.table.cells.len(), self.table.cell_count());
        match self.valid_until {
            None => write!(f, "all {all} layer-steps are known"),
            Some((step, layer)) => write!(
                f,
                "{known} of {all} layer-steps are known; from step {step}, layer {layer} on the search has to be run"
            ),
        }
    }
}
