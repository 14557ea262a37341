//! Convolutions, pooling and interpolation of images.

use super::context::{Context, ints_value, like_first, same_as};
use super::*;
use crate::onnx::elem_type;
use crate::shapes::{Dim, Value};

const fn pooling(name: &'static str) -> Op {
    op(name, Shape::First(pool), Axis::By(rows_and_channels))
}

const fn global(name: &'static str) -> Op {
    op(name, Shape::First(global_pool), Axis::By(rows_and_channels)).ends(positions)
}

/// Of com.microsoft.nchwc: what ONNX Runtime's default level makes of convolutions on CPUs, with channels in blocks.
const fn blocked(name: &'static str, shape: Shape) -> Op {
    Op {
        domain: NCHWC,
        ..op(name, shape, Axis::By(rows))
    }
}

const WITH_INDICES: &str = "its sizes are data";

pub(super) const OPS: &[Op] = &[
    op("Conv", Shape::First(conv), Axis::By(all_but_channels))
        .ends(channels)
        .is(PROJECTION),
    ms("FusedConv", Shape::First(conv), Axis::By(all_but_channels)).ends(channels),
    op(
        "ConvInteger",
        Shape::First(conv_integer),
        Axis::By(all_but_channels),
    ),
    op(
        "QLinearConv",
        Shape::First(conv_quantized),
        Axis::By(all_but_channels),
    ),
    ms("QLinearConv", Shape::First(conv_quantized), Axis::By(rows)),
    op("DeformConv", Shape::First(conv), Axis::By(rows)),
    op(
        "ConvTranspose",
        Shape::First(conv_transpose),
        Axis::By(all_but_channels),
    ),
    ms(
        "ConvTransposeWithDynamicPads",
        Shape::Open(WITH_INDICES),
        Axis::By(rows),
    ),
    ms("NhwcConv", Shape::First(channels_last), Axis::By(rows)),
    ms("NhwcFusedConv", Shape::First(channels_last), Axis::By(rows)),
    op(
        "CausalConvWithState",
        Shape::First(like_first),
        Axis::By(rows_and_channels),
    ),
    ms(
        "CausalConvWithState",
        Shape::First(like_first),
        Axis::By(rows_and_channels),
    ),
    ms(
        "VarlenCausalConvWithState",
        Shape::First(like_first),
        Axis::Lost("rows are put one behind the other"),
    ),
    pooling("MaxPool"),
    pooling("AveragePool"),
    pooling("LpPool"),
    ms(
        "NhwcMaxPool",
        Shape::First(pool_of_channels_last),
        Axis::By(rows),
    ),
    ms(
        "MaxpoolWithMask",
        Shape::First(pool),
        Axis::By(rows_and_channels),
    ),
    ms(
        "QLinearAveragePool",
        Shape::First(open_image),
        Axis::By(rows),
    ),
    op("MaxUnpool", Shape::Open(WITH_INDICES), Axis::By(rows)),
    global("GlobalAveragePool"),
    global("GlobalMaxPool"),
    global("GlobalLpPool"),
    ms(
        "QLinearGlobalAveragePool",
        Shape::First(open_image),
        Axis::By(rows),
    ),
    op("Resize", Shape::First(resize), Axis::By(rows_and_channels)),
    op(
        "Upsample",
        Shape::First(resize),
        Axis::By(rows_and_channels),
    ),
    op(
        "GridSample",
        Shape::First(grid_sample),
        Axis::By(rows_and_channels),
    ),
    ms(
        "GridSample",
        Shape::First(grid_sample),
        Axis::By(rows_and_channels),
    ),
    blocked("ReorderInput", Shape::First(reorder_input)),
    blocked("ReorderOutput", Shape::First(reorder_output)),
    blocked("Conv", Shape::First(conv)),
    blocked("MaxPool", Shape::First(pool)),
    blocked("AveragePool", Shape::First(pool)),
    blocked("GlobalMaxPool", Shape::First(global_pool)),
    blocked("GlobalAveragePool", Shape::First(global_pool)),
    blocked("Upsample", Shape::First(whole_scales)),
];

/// How far one window reaches, how far apart they are, and what is added on both sides: along one axis.
struct Windows {
    reach: i64,
    stride: i64,
    padding: Padding,
    ceil: bool,
}

enum Padding {
    Given(i64),
    /// As much as makes the result `size / stride`.
    Same,
}

impl Windows {
    /// Those of `c` along spatial axis `i` of `spatial`; `kernel` is the size of the window.
    fn of(c: &Context, i: usize, spatial: usize, kernel: i64) -> Option<Self> {
        let dilation = c.list("dilations", 1, spatial)[i];
        let pads = c.list("pads", 0, 2 * spatial);
        let padding = match c.text("auto_pad") {
            None | Some("NOTSET" | "") => Padding::Given(pads[i].checked_add(pads[i + spatial])?),
            Some("VALID") => Padding::Given(0),
            Some(_) => Padding::Same,
        };
        Some(Self {
            reach: dilation
                .checked_mul(kernel.checked_sub(1)?)?
                .checked_add(1)?,
            stride: c.list("strides", 1, spatial)[i].max(1),
            padding,
            ceil: c.flag("ceil_mode"),
        })
    }

    /// How many there are along an axis of this size; `None`: that is not known.
    fn count(&self, size: &Dim) -> Option<Dim> {
        let Self { reach, stride, .. } = *self;
        match (&self.padding, size.known()) {
            (Padding::Same, Some(size)) => Some((size.checked_add(stride - 1)? / stride).into()),
            (Padding::Same, None) if stride == 1 => Some(size.clone()),
            (Padding::Same, None) => None,
            // The last window of ceil_mode may begin in the padding, and then does not count.
            (Padding::Given(_), Some(_)) if self.ceil => None,
            (Padding::Given(padding), Some(size)) => {
                let room = size.checked_add(*padding)?.checked_sub(reach)?;
                Some((room.div_euclid(stride) + 1).into())
            }
            // A patch embedding: the image is a whole number of patches.
            (Padding::Given(0), None) if reach == stride => size.over(&stride.into()),
            (Padding::Given(padding), None) if stride == 1 && *padding == reach - 1 => {
                Some(size.clone())
            }
            (Padding::Given(_), None) => None,
        }
    }
}

fn conv(c: &mut Context) -> Option<Fact> {
    let (x, w) = (c.dims(0)?, c.dims(1)?);
    let dims = convolved(c, &x, &w)?;
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn conv_integer(c: &mut Context) -> Option<Fact> {
    let (x, w) = (c.dims(0)?, c.dims(1)?);
    let dims = convolved(c, &x, &w)?;
    Some(Fact::of(elem_type::INT32, Some(dims)))
}

/// x, its scale and zero point, w, its scale and zero point, those of the result.
fn conv_quantized(c: &mut Context) -> Option<Fact> {
    let ty = c.ty(7);
    if c.flag("channels_last") {
        return open_image(c).map(|fact| Fact {
            elem_type: ty,
            ..fact
        });
    }
    let (x, w) = (c.dims(0)?, c.dims(3)?);
    let dims = convolved(c, &x, &w)?;
    Some(Fact::of(ty, Some(dims)))
}

fn convolved(c: &mut Context, x: &[Dim], w: &[Dim]) -> Option<Vec<Dim>> {
    if x.len() < 3 || x.len() != w.len() {
        return None;
    }
    let spatial = x.len() - 2;
    let mut dims = vec![x[0].clone(), w[0].clone()];
    for i in 0..spatial {
        let windows = Windows::of(c, i, spatial, w[i + 2].known()?)?;
        dims.push(windows.count(&x[i + 2]).unwrap_or_else(|| c.fresh()));
    }
    Some(dims)
}

/// [B, H, W, C]; how weights lie is the provider's.
fn channels_last(c: &mut Context) -> Option<Fact> {
    let (x, w) = (c.dims(0)?, c.dims(1)?);
    let mut dims = vec![x.first()?.clone()];
    for _ in 1..x.len().checked_sub(1)? {
        dims.push(c.fresh());
    }
    dims.push(w.first()?.clone());
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// Sizes as they come out of a transposed convolution; unusual padding leaves them open.
fn conv_transpose(c: &mut Context) -> Option<Fact> {
    let (x, w) = (c.dims(0)?, c.dims(1)?);
    if x.len() < 3 || x.len() != w.len() {
        return None;
    }
    let spatial = x.len() - 2;
    let channels = w[1].times(&c.node.int("group").unwrap_or(1).into())?;
    let mut dims = vec![x[0].clone(), channels];
    let (strides, dilations) = (
        c.list("strides", 1, spatial),
        c.list("dilations", 1, spatial),
    );
    let (pads, extra) = (
        c.list("pads", 0, 2 * spatial),
        c.list("output_padding", 0, spatial),
    );
    let is_plain = matches!(c.text("auto_pad"), None | Some("NOTSET" | ""))
        && c.node.attribute("output_shape").is_none();
    for i in 0..spatial {
        let size = (|| {
            let kernel = w[i + 2].known()?;
            let reach = dilations[i]
                .checked_mul(kernel.checked_sub(1)?)?
                .checked_add(1)?;
            let pads = pads[i].checked_add(pads[i + spatial])?;
            if !is_plain {
                return None;
            }
            match x[i + 2].known() {
                Some(input) => {
                    let grown = strides[i].checked_mul(input.checked_sub(1)?)?;
                    let size = grown.checked_add(reach)?.checked_add(extra[i])?;
                    size.checked_sub(pads).map(Dim::from)
                }
                // Patches are put together again.
                None if reach == strides[i] && pads == 0 && extra[i] == 0 => {
                    x[i + 2].times(&strides[i].into())
                }
                None => None,
            }
        })();
        dims.push(size.unwrap_or_else(|| c.fresh()));
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn pool(c: &mut Context) -> Option<Fact> {
    let x = c.dims(0)?;
    let spatial = x.len().checked_sub(2)?;
    let kernel = c.list("kernel_shape", 1, spatial);
    let mut dims = x[..2].to_vec();
    for i in 0..spatial {
        let windows = Windows::of(c, i, spatial, kernel[i])?;
        dims.push(windows.count(&x[i + 2]).unwrap_or_else(|| c.fresh()));
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn pool_of_channels_last(c: &mut Context) -> Option<Fact> {
    let x = c.dims(0)?;
    let (rows, channels) = (x.first()?.clone(), x.last()?.clone());
    let mut dims = vec![rows];
    dims.extend((2..x.len()).map(|_| c.fresh()));
    dims.push(channels);
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// Rows of images of which no more is known than their rank.
fn open_image(c: &mut Context) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    for dim in dims.iter_mut().skip(1) {
        *dim = c.fresh();
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn global_pool(c: &mut Context) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    dims.iter_mut().skip(2).for_each(|d| *d = 1.into());
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// Interpolation: sizes given, or each the input's times a whole scale.
fn resize(c: &mut Context) -> Option<Fact> {
    let dims = c.dims(0)?;
    // Since opset 18 for some axes only; where a size or a scale is for those, the others stay.
    let axes: Vec<usize> = match c.node.ints("axes") {
        Some(axes) => axes
            .iter()
            .map(|&a| axis(a, dims.len()))
            .collect::<Option<_>>()?,
        None => (0..dims.len()).collect(),
    };
    let keeps_aspect = c
        .text("keep_aspect_ratio_policy")
        .is_some_and(|p| p != "stretch");
    let is_old = c.node.is("Upsample") || c.node.proto.input.len() == 2;
    let sizes = (!is_old).then(|| c.value(3).and_then(ints_value)).flatten();
    let sizes = sizes
        .filter(|s| s.len() == axes.len() && !keeps_aspect)
        .map(<[Dim]>::to_vec);
    let given = c.node.attribute("scales").map(|a| a.floats.clone());
    let scales = given
        .map(|s| s.into_iter().map(f64::from).collect())
        .or_else(|| match c.value(if is_old { 1 } else { 2 }) {
            Some(Value::Floats(v)) => Some(v.clone()),
            _ => None,
        })
        .filter(|s: &Vec<f64>| s.len() == axes.len());
    let is_sized = c.input(3).is_some() && !is_old;
    let mut result = Vec::with_capacity(dims.len());
    for (at, dim) in dims.into_iter().enumerate() {
        let i = axes.iter().position(|&a| a == at);
        let size = match (i, &sizes, &scales) {
            (None, ..) => Some(dim),
            (Some(i), Some(sizes), _) => Some(sizes[i].clone()),
            (Some(i), None, Some(scales)) if !is_sized => scaled(&dim, scales[i]),
            // An image is scaled in its last axes.
            _ if at < 2 && axes.len() > 2 => Some(dim),
            _ => None,
        };
        result.push(size.unwrap_or_else(|| c.fresh()));
    }
    Some(Fact::of(c.ty(0), Some(result)))
}

fn scaled(dim: &Dim, scale: f64) -> Option<Dim> {
    match dim.known() {
        Some(size) => {
            let size = (size as f64 * scale).floor();
            (0.0..=f64::from(i32::MAX))
                .contains(&size)
                .then(|| (size as i64).into())
        }
        None if scale == scale.trunc() && scale >= 1.0 => dim.times(&(scale as i64).into()),
        None => None,
    }
}

fn whole_scales(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?.iter();
    let dims = dims
        .zip(c.node.ints("scales")?)
        .map(|(d, &s)| d.times(&s.into()));
    Some(Fact::of(c.ty(0), Some(dims.collect::<Option<_>>()?)))
}

fn grid_sample(c: &mut Context) -> Option<Fact> {
    let (x, grid) = (c.shape(0)?, c.shape(1)?);
    let inner = grid.get(1..grid.len().checked_sub(1)?)?;
    let dims = [x.get(..2)?, inner].concat();
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// Channels are filled up to whole blocks of 8 or 16, by processor.
fn reorder_input(c: &mut Context) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    if c.flag("channels_last") {
        let channels = dims.pop()?;
        dims.insert(1.min(dims.len()), channels);
    }
    let channels = dims.get(1)?.known();
    if channels.is_none_or(|n| n % 16 != 0) {
        dims[1] = c.fresh();
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn reorder_output(c: &mut Context) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    *dims.get_mut(1)? = c.node.int("channels")?.into();
    if c.flag("channels_last") {
        let channels = dims.remove(1);
        dims.push(channels);
    }
    same_as(c, c.ty(0)).map(|fact| Fact {
        shape: Some(dims),
        ..fact
    })
}

fn all_but_channels(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    match (f.slot, at) {
        (0, 0) => f.moved(0, &inner),
        (0, 1) => None,
        (0, _) => f.unless_resized(),
        _ => None,
    }
}

fn channels(f: &AxisStep) -> bool {
    f.slot == 0 && f.at().is_some_and(|(at, _)| at == 1)
}

fn positions(f: &AxisStep) -> bool {
    f.at().is_some_and(|(at, _)| at >= 2)
}

fn rows_and_channels(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    match (f.slot, at) {
        (0, 0 | 1) if f.out == 0 => f.moved(at, &inner),
        _ => None,
    }
}

fn rows(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    (f.slot == 0 && at == 0).then(|| f.moved(0, &inner))?
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;

    #[test]
    fn windows_are_counted() {
        let conv = |size: &str| {
            let mut g = Given::new("Conv").ints_attribute("strides", &[2, 2]);
            g.input(1, &["batch", "3", size, "8"])
                .input(1, &["16", "3", "2", "2"]);
            g.shows()
        };
        assert_eq!(conv("9"), "float32 [batch, 16, 4, 4]");
        assert_eq!(conv("height"), "float32 [batch, 16, height/2, 4]");
        let mut g = Given::new("Conv")
            .text("auto_pad", "SAME_UPPER")
            .ints_attribute("strides", &[2]);
        g.input(1, &["batch", "3", "9"]).input(1, &["16", "3", "3"]);
        assert_eq!(g.shows(), "float32 [batch, 16, 5]");
        assert_eq!(
            (g.axis(0, 0), g.axis(0, 1), g.axis(0, 2)),
            (Some(0), None, None)
        );
        let mut g = Given::new("MaxPool")
            .ints_attribute("kernel_shape", &[3])
            .ints_attribute("pads", &[1, 1]);
        g.input(1, &["batch", "3", "tokens"]);
        assert_eq!(g.shows(), "float32 [batch, 3, tokens]");
    }

    #[test]
    fn patches_are_put_together_again() {
        let mut g = Given::new("ConvTranspose").ints_attribute("strides", &[2, 2]);
        g.input(1, &["batch", "16", "height", "4"])
            .input(1, &["16", "3", "2", "2"]);
        assert_eq!(g.shows(), "float32 [batch, 3, 2·height, 8]");
    }

    #[test]
    fn images_are_scaled() {
        let mut g = Given::new("Resize");
        g.input(1, &["batch", "3", "height", "5"])
            .left_out()
            .floats(&[1.0, 1.0, 2.0, 1.5]);
        assert_eq!(g.shows(), "float32 [batch, 3, 2·height, 7]");
        let mut g = Given::new("Resize");
        g.input(1, &["batch", "3", "height", "5"])
            .left_out()
            .left_out()
            .sizes(&["batch", "3", "8", "9"]);
        assert_eq!(g.shows(), "float32 [batch, 3, 8, 9]");
        let mut g = Given::new("GridSample");
        g.input(1, &["batch", "3", "8", "8"])
            .input(1, &["batch", "5", "6", "2"]);
        assert_eq!(g.shows(), "float32 [batch, 3, 5, 6]");
    }

    #[test]
    fn blocked_channels_come_back() {
        let mut g = Given::domain("com.microsoft.nchwc", "ReorderOutput").int("channels", 12);
        g.input(1, &["batch", "16", "8", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 12, 8, 8]");
        assert_eq!(g.axis(0, 0), Some(0));
        let mut g = Given::domain("com.microsoft.nchwc", "ReorderInput");
        g.input(1, &["batch", "4", "8", "8"]);
        assert_eq!(g.shows(), "float32 [batch, ?, 8, 8]");
    }
}
