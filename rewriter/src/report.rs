//! What `inspect` and a rewrite tell: the same facts as a table for people and as JSON for programs.

use crate::account::Account;
use crate::find::{Kind, Layer, Survey, Text, Watched};
use crate::lower::{Dense, fits_windows};
use crate::onnx::{ModelFile, elem_type};
use crate::run::dense::Measured;
use crate::shapes::Facts;
use crate::sizes::{self, Given};
use comfy_table::{ContentArrangement, Table, presets};
use ditfastattn_plans::{Action, Plan};
use serde::Serialize;
use std::fmt::Write;

/// Everything about one model, and about a plan for it.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: Model,
    pub inputs: Inputs,
    pub sites: Vec<Site>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanReport>,
    /// Who computes steps that stay dense, if that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense: Option<DenseReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// Triton's configuration, if one was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub triton_config: Option<String>,
}

/// Names of a kind that are listed, so that a table stays one.
const FEW: usize = 4;

#[derive(Debug, Serialize)]
pub struct Model {
    pub path: String,
    pub bytes: usize,
    pub ir_version: i64,
    pub opset: i64,
    pub producer: String,
    pub nodes: usize,
    pub external_data: Vec<String>,
    pub layers: usize,
    pub module_form: usize,
    pub core_form: usize,
}

#[derive(Debug, Serialize)]
pub struct Inputs {
    pub timestep: String,
    pub latents: String,
    pub conditioning: Vec<String>,
    /// The graph makes guidance's two halves of each row that is fed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub halves_in_graph: bool,
    /// Inputs with a default; watched like the others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub optional: Vec<String>,
    /// Inputs that are no tensors: runs without a request id cannot be told apart.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hidden: Vec<String>,
    #[serde(skip)]
    notes: Vec<String>,
}

/// One softmax or attention operator.
#[derive(Debug, Serialize)]
pub struct Site {
    pub node: String,
    pub op: String,
    /// `self`, `joint`, `skipped`, `cross`, `elsewhere`, `unsupported` or `unknown`.
    pub kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// `module` or `core`, for layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub form: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<String>,
    /// Where they are not provably as many as there are tokens: then the layer cannot have windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keys: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<&'static str>,
    /// Tokens of the sequence that are text, and on which side of the image they lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<TextReport>,
    /// First and last values of the wrapped module, one per stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<[Vec<String>; 2]>,
    /// Why it is left alone, or why only its core is replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reason_nodes: Vec<String>,
}

/// Text tokens of a joint sequence.
#[derive(Debug, Serialize)]
pub struct TextReport {
    /// A number, or the sizes that make it up at run time.
    pub tokens: String,
    pub side: &'static str,
}

/// What a plan does to the model.
#[derive(Debug, Serialize)]
pub struct PlanReport {
    pub name: Option<String>,
    pub steps: usize,
    pub cfg: String,
    pub window: f64,
    pub counts: Vec<(String, usize)>,
    /// What the plan saves; absent where a size is known at run time only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved: Option<Account>,
    /// Why it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unknown: Option<String>,
}

impl Report {
    pub fn new(model: &ModelFile, survey: &Survey) -> Self {
        let layers: Vec<&Layer> = survey.layers().collect();
        let module_form = layers.iter().filter(|l| l.module.is_ok()).count();
        let watched = Watched::new(&model.graph, &survey.inputs, model.ir_version);
        let mut notes: Vec<String> = watched.cost().into_iter().collect();
        if let Some(input) = watched.hidden.first() {
            notes.push(format!(
                "the input `{input}` is no tensor, so clients that differ in it cannot be told apart: runs without \
                 dfa_request_id stay dense"
            ));
        }
        let required = |name: &&String| !watched.optional.contains(name);
        Self {
            model: Model {
                path: model.path.display().to_string(),
                bytes: model.size,
                ir_version: model.ir_version,
                opset: model.onnx_opset(),
                producer: model.producer.clone(),
                nodes: model.graph.nodes.len(),
                external_data: model.external_data_locations().into_iter().collect(),
                layers: layers.len(),
                module_form,
                core_form: layers.len() - module_form,
            },
            inputs: Inputs {
                timestep: survey.inputs.timestep.clone(),
                latents: survey.inputs.latents.clone(),
                halves_in_graph: !survey.facts.pairs().is_empty(),
                conditioning: watched.names.iter().filter(required).cloned().collect(),
                optional: watched.optional.clone(),
                hidden: watched.hidden.clone(),
                notes,
            },
            sites: survey
                .sites
                .iter()
                .map(|s| site(s, &survey.facts))
                .collect(),
            plan: None,
            dense: None,
            output: None,
            triton_config: None,
        }
    }

    /// Adds what `plan` does, for a model of the sizes `given` where the graph leaves them open. `survey` must be the one this
    /// report was made of, and the plan must fit it. `attention_share`: see [`Account::new`].
    pub fn with_plan(
        mut self,
        plan: &Plan,
        survey: &Survey,
        given: &Given,
        attention_share: Option<f64>,
    ) -> Self {
        let works = sizes::layers(survey, plan, given);
        let unknown = works.as_ref().err().map(|unknown| {
            format!(
                "the {} of layer {} are known at run time only; say them with {}",
                unknown.what,
                unknown.layer,
                if unknown.what == "text tokens" {
                    "--text-tokens"
                } else {
                    "--tokens"
                }
            )
        });
        let saved = works.ok().and_then(|works| {
            let caches = sizes::caches(survey, &works);
            Account::new(plan, &works, &caches, attention_share).ok()
        });
        self.plan = Some(PlanReport {
            name: plan.name.clone(),
            steps: plan.step_count(),
            cfg: plan.cfg.name().to_owned(),
            window: plan.window,
            counts: counts(plan),
            saved,
            unknown,
        });
        self
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let m = &self.model;
        let _ = writeln!(
            text,
            "{}: opset {}, IR {}, {} nodes, {}",
            m.path,
            m.opset,
            m.ir_version,
            m.nodes,
            bytes(m.bytes as u64)
        );
        let _ = writeln!(
            text,
            "inputs: timestep `{}`, latents `{}`, conditioning {}",
            self.inputs.timestep,
            self.inputs.latents,
            if self.inputs.conditioning.is_empty() {
                "none".into()
            } else {
                format!("`{}`", self.inputs.conditioning.join("`, `"))
            }
        );
        if self.inputs.halves_in_graph {
            let _ = writeln!(text, "guidance: the graph makes both halves of each row");
        }
        match self.inputs.optional.as_slice() {
            [] => {}
            few if few.len() <= FEW => {
                let _ = writeln!(text, "inputs with a default: `{}`", few.join("`, `"));
            }
            many => {
                let _ = writeln!(
                    text,
                    "inputs with a default: `{}` and {} more",
                    many[..FEW].join("`, `"),
                    many.len() - FEW
                );
            }
        }
        for note in &self.inputs.notes {
            let _ = writeln!(text, "{note}");
        }
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Disabled);
        let with_text = self.sites.iter().any(|s| s.text.is_some());
        let columns = |row: [String; 8]| {
            let row = row.into_iter().enumerate();
            row.filter(move |(i, _)| *i != 5 || with_text)
                .map(|(_, cell)| cell)
                .collect::<Vec<_>>()
        };
        let header = [
            "layer",
            "attention",
            "form",
            "heads×dim",
            "tokens",
            "text",
            "dtype",
            "node",
        ];
        table.set_header(columns(header.map(str::to_owned)));
        let or_dash = |s: Option<String>| s.unwrap_or_else(|| "-".into());
        for s in &self.sites {
            table.add_row(columns([
                or_dash(s.layer.map(|l| l.to_string())),
                s.kind.into(),
                s.form.unwrap_or("left alone").into(),
                match (s.heads, s.head_dim) {
                    (Some(h), Some(d)) => format!("{h}×{d}"),
                    _ => "-".into(),
                },
                or_dash(s.tokens.clone()),
                or_dash(
                    s.text
                        .as_ref()
                        .map(|t| format!("{} at {}", t.tokens, t.side)),
                ),
                s.dtype.unwrap_or("-").into(),
                s.node.clone(),
            ]));
        }
        for line in table.lines() {
            let _ = writeln!(text, "{}", line.trim_end());
        }
        for s in &self.sites {
            if let Some(reason) = &s.reason {
                let nodes: Vec<&str> = s
                    .reason_nodes
                    .iter()
                    .map(String::as_str)
                    .filter(|n| *n != s.node)
                    .collect();
                let at = if nodes.is_empty() {
                    String::new()
                } else {
                    format!(" (at {})", nodes.join(", "))
                };
                let _ = writeln!(text, "{}: {reason}{at}", s.node);
            }
        }
        for (s, keys) in self
            .sites
            .iter()
            .filter_map(|s| Some((s, s.keys.as_ref()?)))
        {
            let _ = writeln!(
                text,
                "{}: no windows (wa-rs): its keys are {keys} tokens, not as many as its queries",
                s.node
            );
        }
        let _ = writeln!(
            text,
            "{} self-attention layer(s): {} in module form, {} in core form; {} other site(s) left alone",
            m.layers,
            m.module_form,
            m.core_form,
            self.sites.len() - m.layers
        );
        if let Some(plan) = &self.plan {
            let name = plan
                .name
                .as_deref()
                .map_or(String::new(), |n| format!(" {n}"));
            let _ = writeln!(
                text,
                "plan{name}: {} steps, cfg {}, window {}: {}",
                plan.steps,
                plan.cfg,
                plan.window,
                listed(&plan.counts)
            );
            match (&plan.saved, &plan.unknown) {
                (Some(account), _) => {
                    let _ = write!(text, "{account}");
                }
                (None, Some(why)) => {
                    let _ = writeln!(text, "attention FLOPs saved and peak cache: {why}");
                }
                (None, None) => {}
            }
        }
        if let Some(dense) = &self.dense {
            let _ = writeln!(text, "{dense}");
        }
        for file in self.output.iter().chain(&self.triton_config) {
            let _ = writeln!(text, "wrote {file}");
        }
        text
    }
}

/// Who computes attention at steps that stay dense.
#[derive(Debug, Serialize)]
pub struct DenseReport {
    pub by: Dense,
    /// The layers that the host computes then.
    pub layers: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

impl std::fmt::Display for DenseReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let who = match self.by {
            Dense::Library => "the op library".to_owned(),
            Dense::Host => format!(
                "ONNX Runtime, with the model's own attention, in {} layer(s)",
                self.layers.len()
            ),
        };
        write!(f, "dense steps: by {who}")?;
        let Some(m) = &self.measured else {
            return Ok(());
        };
        write!(
            f,
            " (a step takes {:.1} ms by the library, {:.1} ms by ONNX Runtime: {:.3} of it, {} rounds, {} provider)",
            m.library_ms, m.host_ms, m.ratio, m.rounds, m.provider
        )
    }
}

fn text(layer: &Layer, facts: &Facts) -> Option<TextReport> {
    let Text::Known { pieces, at_start } = &layer.text else {
        return None;
    };
    let tokens = match layer.text.known() {
        Some(tokens) => tokens.to_string(),
        None => {
            let names = pieces.iter().map(|p| facts.symbols.show(&p.tokens));
            names.collect::<Vec<_>>().join(" + ")
        }
    };
    Some(TextReport {
        tokens,
        side: if *at_start { "start" } else { "end" },
    })
}

fn site(site: &crate::find::Site, facts: &Facts) -> Site {
    let mut row = Site {
        node: site.node.clone(),
        op: site.op.clone(),
        kind: "unknown",
        layer: None,
        form: None,
        heads: None,
        head_dim: None,
        tokens: None,
        keys: None,
        text: None,
        dtype: None,
        region: None,
        reason: None,
        reason_nodes: Vec::new(),
    };
    let mut because = |reason: &crate::find::Reason| {
        row.reason = Some(reason.text.clone());
        row.reason_nodes = reason.nodes.clone();
    };
    match &site.kind {
        Kind::Layer(layer) => {
            if let Err(reason) = &layer.module {
                because(reason);
            }
            row.kind = if layer.joint { "joint" } else { "self" };
            row.layer = Some(layer.index);
            row.form = Some(if layer.module.is_ok() {
                "module"
            } else {
                "core"
            });
            row.heads = layer.core.heads;
            row.head_dim = layer.core.head_dim;
            row.tokens = layer.core.tokens.as_ref().map(|d| facts.symbols.show(d));
            if !fits_windows(layer) {
                let keys = layer.core.keys.as_ref().map(|d| facts.symbols.show(d));
                row.keys = Some(keys.unwrap_or_else(|| "unknown".into()));
            }
            row.text = text(layer, facts);
            row.dtype = Some(elem_type::name(layer.core.elem_type));
            row.region = layer
                .module
                .as_ref()
                .ok()
                .map(|m| [m.sources.clone(), m.sinks.clone()]);
        }
        Kind::Skipped(reason) => {
            because(reason);
            row.kind = "skipped";
        }
        Kind::Cross { queries, keys } => {
            row.kind = "cross";
            row.reason = Some(format!(
                "cross-attention: q comes from `{queries}`, k and v from `{keys}`"
            ));
        }
        Kind::Elsewhere(reason) => {
            because(reason);
            row.kind = "elsewhere";
        }
        Kind::Unsupported(reason) => {
            because(reason);
            row.kind = "unsupported";
        }
        Kind::Unknown(reason) => because(reason),
    }
    row
}

/// How often `plan` has each action.
pub fn counts(plan: &Plan) -> Vec<(String, usize)> {
    let counts = plan.counts();
    let count = |&action: &Action| (action.to_string(), counts.of(action));
    Action::ALL.iter().map(count).collect()
}

/// `20 full, 3 ast`: the actions that occur.
pub fn listed(counts: &[(String, usize)]) -> String {
    let occurring = counts.iter().filter(|(_, n)| *n > 0);
    let words: Vec<_> = occurring
        .map(|(action, n)| format!("{n} {action}"))
        .collect();
    words.join(", ")
}

/// `1.5 MiB`.
pub fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}
