//! What is worth one line in the log.

/// Something worth one line in the log, once per session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    OddRows {
        rows: usize,
    },
    Ambiguous,
    Unplanned,
    OverBudget,
    /// `cfg: separate`: the two runs of a step are of different shapes.
    UnlikeRuns,
}

impl Notice {
    pub(super) fn bit(self) -> u32 {
        match self {
            Notice::OddRows { .. } => 1,
            Notice::Ambiguous => 2,
            Notice::Unplanned => 4,
            Notice::OverBudget => 8,
            Notice::UnlikeRuns => 16,
        }
    }
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Notice::OddRows { rows } => write!(
                f,
                "the plan shares attention between the halves of guidance, but a batch of {rows} has no halves: \
                 computed for all rows"
            ),
            Notice::Ambiguous => f.write_str(
                "runs without a request id do not continue one another: computed in full until one clearly does; \
                 feed dfa_request_id to run several generations at once",
            ),
            Notice::Unplanned => f.write_str(
                "a timestep is not in the plan: computed in full; make the plan for this scheduler and number of steps, \
                 or rewrite with --schedule any",
            ),
            Notice::OverBudget => f.write_str(
                "the memory budget for caches is used up: some layers are computed in full; \
                 raise DITFASTATTN_CACHE_BYTES",
            ),
            Notice::UnlikeRuns => f.write_str(
                "the plan shares attention between the two runs of a step, but they are fed tensors of different shapes: \
                 the second run computes its own; pad both prompts to one length to share",
            ),
        }
    }
}
