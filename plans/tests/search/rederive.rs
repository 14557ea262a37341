//! A loss table under another δ: what it claims to know is what a search finds.

use ditfastattn_plans::{Cfg, Journal, LossTable, Metric, Settings, search};
use proptest::prelude::*;

use super::toy::{Resuming, Sizes, Toy};
use super::{cases, go_on, run, settings};

fn rederived_agrees(sizes: Sizes, settings: &Settings, delta: f64) -> Result<(), TestCaseError> {
    let (old, _) = run(sizes, settings);
    let rederived = old.table.rederive(delta).unwrap();
    let settings = Settings {
        delta,
        ..settings.clone()
    };
    let (new, _) = run(sizes, &settings);

    let known = rederived.table.cells();
    prop_assert_eq!(known, &new.table.cells()[..known.len()]);
    prop_assert_eq!(rederived.valid_until, rederived.table.next());
    let old_actions = old.table.cells().iter().map(|cell| cell.action);
    let new_actions = new.table.cells().iter().map(|cell| cell.action);
    let first = old_actions.zip(new_actions).position(|(a, b)| a != b);
    match (rederived.differs_at, first) {
        // Known up to and including the first difference, and never beyond it.
        (Some((step, layer)), Some(first)) => {
            prop_assert_eq!((step - 1) * sizes.layers + layer, first);
            prop_assert_eq!(known.len(), first + 1);
        }
        (None, None) => {}
        (None, Some(first)) => prop_assert_eq!(known.len(), first),
        (Some(_), None) => prop_assert!(false, "a difference where there is none"),
    }

    let mut bytes = Vec::new();
    let mut journal = Journal::new(&mut bytes, &settings).unwrap();
    let mut resuming = Resuming::new(Toy::new(sizes, settings.cfg));
    let seeded = search(&mut resuming, rederived.table, &mut journal, &mut go_on).unwrap();
    prop_assert_eq!(&seeded.table, &new.table);
    prop_assert!(seeded.effort.trials <= new.effort.trials);
    prop_assert_eq!(LossTable::parse(&bytes).unwrap(), new.table);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_known_is_what_a_search_finds((sizes, settings) in cases(), delta in 0.0f64..0.4) {
        rederived_agrees(sizes, &settings, delta)?;
    }

    #[test]
    fn close_thresholds_share_most((sizes, settings) in cases(), factor in 0.97f64..1.03) {
        let delta = settings.delta * factor;
        rederived_agrees(sizes, &settings, delta)?;
    }

    #[test]
    fn rederived_twice_it_still_knows_only_what_is_true((sizes, settings) in cases(), one in 0.0f64..0.4, two in 0.0f64..0.4) {
        let (old, _) = run(sizes, &settings);
        let table = old.table.rederive(one).unwrap().table.rederive(two).unwrap().table;
        let settings = Settings { delta: two, ..settings };
        let (new, _) = run(sizes, &settings);
        prop_assert_eq!(table.cells(), &new.table.cells()[..table.cells().len()]);
        let mut resuming = Resuming::new(Toy::new(sizes, settings.cfg));
        let seeded = search(&mut resuming, table, &mut (), &mut go_on).unwrap();
        prop_assert_eq!(seeded.table, new.table);
    }
}

#[test]
fn the_same_threshold_is_known_throughout_and_a_wrong_one_is_refused() {
    let sizes = Sizes {
        layers: 4,
        steps: 5,
        samples: 1,
        seed: 9,
    };
    let (found, _) = run(sizes, &settings(&sizes, Cfg::CondFirst, 0.1, Metric::Mrae));
    let same = found.table.rederive(0.1).unwrap();
    assert_eq!((same.valid_until, same.differs_at), (None, None));
    assert_eq!(same.table, found.table);
    assert_eq!(same.to_string(), "all 16 layer-steps are known");
    let none = found.table.rederive(0.0).unwrap();
    assert!(none.valid_until.is_some());
    let text = none.to_string();
    assert!(
        text.contains("layer-steps are known; from step 1, layer"),
        "{text}"
    );
    assert!(found.table.rederive(f64::NAN).is_err());
}
