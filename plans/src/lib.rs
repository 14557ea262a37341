//! What every attention layer does at every diffusion step: the plan.
//!
//! This crate owns the plan's file format and its checks ([`Plan`]), what a plan implies for the
//! caches that run it ([`Liveness`]), what it saves ([`Cost`], [`Times`]), how it is found
//! ([`search()`]) and how it looks ([`HeatMap`], [`ValueMap`], [`LineChart`]). It knows nothing of ONNX, of ONNX Runtime or of
//! how attention is computed, and it opens no files: text and bytes go in, text and bytes come
//! out; only a [`Journal`] writes to the file that it is given.
//!
//! ```
//! use ditfastattn_plans::{Action, Plan};
//!
//! let plan = Plan::parse(r#"{"format": "ditfastattn-plan", "version": 1,
//!                            "steps": [["full", "full"], ["wa-rs", "ast"]]}"#)?;
//! assert_eq!(plan.action(1, 0), Action::WaRs);
//! // Step 1 of layer 0 reads the residual that step 0 has to leave behind; layer 1 needs none.
//! assert!(plan.liveness().residual_live_after(0, 0));
//! assert!(!plan.liveness().residual_live_after(0, 1));
//! # Ok::<(), ditfastattn_plans::PlanError>(())
//! ```
#![forbid(unsafe_code)]

mod action;
mod cost;
mod error;
mod import;
mod liveness;
mod parse;
mod pictures;
mod plan;
mod schema;
mod search;
mod source;
mod time;
mod write;

pub use action::{Action, UnknownAction};
pub use cost::{Cost, Counts, LayerCount, LayerWork, Workload, band_density, band_density_limit};
pub use error::{PlanError, PlanErrorKind};
pub use liveness::{CacheShape, Liveness, PeakBytes};
pub use parse::MAX_PLAN_BYTES;
pub use pictures::{Axis, HeatMap, LineChart, Scale, Series, TooLarge, ValueMap, Values};
pub use plan::{Cfg, DEFAULT_WINDOW, Fingerprint, Plan, Side, TextTokens};
pub use schema::json_schema;
pub use search::{
    Cell, Denoiser, Effort, Forward, Found, InvalidSettings, Journal, JournalError, LossTable,
    Metric, OutputMismatch, PAPER_ORDER, Progress, Record, Rederived, Repeated, SearchError,
    Settings, Trial, Tried, UnknownMetric, candidates_by_cost, candidates_in_order, search,
};
pub use time::{Throughput, Times};
