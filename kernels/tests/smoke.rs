//! smoke
use ditfastattn_kernels::*;

#[test]
fn full_matches_the_oracle() {
    let shape = Shape {
        batch: 2,
        heads: 2,
        kv_heads: 1,
        q_tokens: 9,
        kv_tokens: 9,
        head_dim: 4,
        v_dim: 3,
    };
    let x: Vec<f32> = (0..500)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0)
        .collect();
    let mut o = vec![0f32; 2 * 2 * 9 * 3];
    let mut r = o.clone();
    let a = Attention {
        shape,
        scale: 0.5,
        q: Input::from_slice(&x, Strides::bhsd(2, 9, 4)),
        k: Input::from_slice(&x[7..], Strides::bhds(1, 9, 4)),
        v: Input::from_slice(&x[3..], Strides::bhsd(1, 9, 3)),
        out: Output::from_slice(&mut o, Strides::bhsd(2, 9, 3)),
        mode: Mode::FullCapture {
            band: Band::new(2),
            residual: Output::from_slice(&mut r, Strides::bhsd(2, 9, 3)),
        },
    };
    let want = oracle::attention(&a).unwrap();
    attention(&a, &Threads(2)).unwrap();
    for (x, y) in o
        .iter()
        .zip(&want.out)
        .chain(r.iter().zip(want.residual.as_ref().unwrap()))
    {
        assert!((f64::from(*x) - y).abs() < 1e-5, "{x} {y}");
    }
}
