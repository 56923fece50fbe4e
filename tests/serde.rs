//! Configurations as text and back (feature `serde`).

use rankgrad::lowrank::*;

#[test]
fn a_configuration_is_written_and_read() {
    let config = SpectronConfig {
        radius: Radius::Exact,
        certify: true,
        orthogonaliser: Orthogonaliser::PolarExpress { steps: 6, space: Space::Plain },
        ..SpectronConfig::default()
    };
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<SpectronConfig>(&text).unwrap(), config);
    let schedule = Schedule { kind: ScheduleKind::Wsd { decay: 0.2 }, steps: 100, warmup: 5, end: 0.1 };
    let text = serde_json::to_string(&schedule).unwrap();
    assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), schedule);
}

/// What a file leaves out is the paper's; what it misspells is refused.
#[test]
fn a_part_of_a_configuration_is_enough() {
    let config: SpectronConfig = serde_json::from_str(r#"{"beta": 0.9, "nesterov": true}"#).unwrap();
    assert_eq!(config, SpectronConfig { beta: 0.9, nesterov: true, ..SpectronConfig::default() });
    let error = serde_json::from_str::<SpectronConfig>(r#"{"bta": 0.9}"#).unwrap_err().to_string();
    assert!(error.contains("unknown field `bta`"), "{error}");
    let error =
        serde_json::from_str::<Schedule>(r#"{"kind": "Cosine", "steps": 9}"#).unwrap_err().to_string();
    assert!(error.contains("missing field"), "{error}");
}
