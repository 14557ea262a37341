//! A model in one session, as it is served.

use super::array::Array;
use super::engine::{EngineError, Values, to_array};
use super::host::{Host, HostError};
use crate::onnx::ModelFile;
use ditfastattn_contract::graph;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Tensor};

/// Whose step a run of a rewritten model is, and where in its generation.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub request: i64,
    pub start: bool,
    pub end: bool,
}

/// A loaded model.
pub struct Whole {
    what: &'static str,
    session: Session,
    output: String,
}

impl Whole {
    /// Loads `bytes`, a model whose weights lie where those of `file` lie. `what` names it in errors.
    ///
    /// # Errors
    /// ONNX Runtime's own words.
    pub fn load(
        host: &Host,
        what: &'static str,
        file: &ModelFile,
        bytes: &[u8],
    ) -> Result<Self, HostError> {
        let external = !file.external_data_locations().is_empty();
        Ok(Self {
            what,
            session: host.session(what, bytes, file.folder(), external)?,
            output: file.graph.outputs.first().cloned().unwrap_or_default(),
        })
    }

    /// The model's first output for `inputs`; a rewritten model is told the moment.
    ///
    /// # Errors
    /// What ONNX Runtime says, and an output that is no floating-point tensor.
    pub fn run(&mut self, inputs: &Values, moment: Option<Moment>) -> Result<Array, EngineError> {
        let what = self.what;
        let failed = |source| HostError::Run {
            what: what.to_owned(),
            source,
        };
        let mut feed: Vec<(&str, SessionInputValue<'_>)> = inputs
            .iter()
            .map(|(name, value)| (name.as_str(), SessionInputValue::from(value.as_ref())))
            .collect();
        let told = moment.map(Moment::values).transpose().map_err(failed)?;
        for (name, value) in told.iter().flatten() {
            feed.push((name, SessionInputValue::from(value)));
        }
        let outputs = self.session.run(feed).map_err(failed)?;
        let missing = || EngineError::Missing(self.output.clone());
        to_array(&self.output, outputs.get(&self.output).ok_or_else(missing)?)
    }
}

impl Moment {
    fn values(self) -> Result<[(&'static str, DynValue); 3], ort::Error> {
        let scalar = Vec::<usize>::new;
        let truth =
            |x: bool| Ok::<_, ort::Error>(Tensor::from_array((scalar(), vec![x]))?.into_dyn());
        Ok([
            (
                graph::REQUEST_ID,
                Tensor::from_array((scalar(), vec![self.request]))?.into_dyn(),
            ),
            (graph::START, truth(self.start)?),
            (graph::END, truth(self.end)?),
        ])
    }
}
