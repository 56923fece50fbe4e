//! Learning-rate schedules, as a factor on the base rate.

/// The shape after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum ScheduleKind {
    /// Stays at 1.
    Constant,
    /// Half a cosine down to the final factor.
    Cosine,
    /// A straight line down to the final factor.
    Linear,
    /// Warm-up–stable–decay: stays at 1, then a straight line down over the last `decay` of the steps (e.g. 0.2).
    Wsd { decay: f64 },
}

/// A linear warm-up followed by one of the shapes.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Schedule {
    pub kind: ScheduleKind,
    /// Total steps.
    pub steps: u64,
    /// Steps of the warm-up: step i < warmup has the factor (i + 1) / warmup.
    pub warmup: u64,
    /// The factor at the end of a decay.
    pub end: f64,
}

impl Schedule {
    /// The factor of `step`, counted from 0. Past the last step it stays at the end.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / span).min(1.0);
        let line = |done: f64| 1.0 - (1.0 - self.end) * done;
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Cosine => {
                self.end + (1.0 - self.end) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
            ScheduleKind::Linear => line(done),
            ScheduleKind::Wsd { decay } => line(((done - (1.0 - decay)) / decay).clamp(0.0, 1.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let s = |kind| Schedule { kind, steps: 1100, warmup: 100, end: 0.1 };
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Wsd { decay: 0.2 }] {
            let s = s(kind);
            assert_eq!(s.factor(0), 0.01);
            assert_eq!(s.factor(99), 1.0);
            assert_eq!(s.factor(100), 1.0);
            assert!((s.factor(1100) - 0.1).abs() < 1e-12);
            assert!((s.factor(5000) - 0.1).abs() < 1e-12);
            assert!((100..1100).all(|i| s.factor(i + 1) <= s.factor(i)));
        }
        assert!((s(ScheduleKind::Cosine).factor(600) - 0.55).abs() < 1e-12);
        assert!((s(ScheduleKind::Linear).factor(600) - 0.55).abs() < 1e-12);
        assert_eq!(s(ScheduleKind::Wsd { decay: 0.2 }).factor(899), 1.0);
        assert_eq!(s(ScheduleKind::Constant).factor(1099), 1.0);
    }
}
