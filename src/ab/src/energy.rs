//! Energy, where the system tells it: RAPL counters on Linux, `powermetrics` on macOS. Both need root; without it, or
//! in a virtual machine, there is no figure, and none is made up.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What the processors of this machine took, all processes together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// Joules.
    pub joules: f64,
    /// Who said so.
    pub source: String,
}

/// A measurement under way.
#[derive(Debug)]
pub enum Meter {
    /// Counters and what they showed at the start.
    Rapl(Vec<Zone>),
    /// A running `powermetrics`, and who reads what it prints.
    #[cfg(target_os = "macos")]
    PowerMetrics(std::process::Child, std::thread::JoinHandle<String>),
}

/// One RAPL package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    dir: PathBuf,
    start_uj: u64,
    range_uj: u64,
}

impl Meter {
    /// Starts; `None` where the system does not tell.
    pub fn start() -> Option<Meter> {
        #[cfg(target_os = "macos")]
        return power_metrics();
        #[cfg(not(target_os = "macos"))]
        {
            let zones = packages(Path::new("/sys/class/powercap"));
            (!zones.is_empty()).then_some(Meter::Rapl(zones))
        }
    }

    /// What was taken since the start.
    pub fn finish(self) -> Option<Energy> {
        match self {
            Meter::Rapl(zones) => {
                let joules =
                    zones.iter().map(|z| Some(z.used_uj(number(&z.dir.join("energy_uj"))?) as f64 / 1e6));
                Some(Energy { joules: joules.sum::<Option<f64>>()?, source: "rapl package".to_owned() })
            }
            #[cfg(target_os = "macos")]
            Meter::PowerMetrics(mut child, reader) => {
                // it runs as root, and so does who may end it; sudo passes the signal on, and what was sampled stands
                let pid = child.id().to_string();
                let told = std::process::Command::new("sudo").args(["-n", "kill", "-INT", &pid]).status();
                if !told.is_ok_and(|status| status.success()) {
                    return None;
                }
                let _ = child.wait();
                let joules = sum_power_metrics(&reader.join().ok()?)?;
                Some(Energy { joules, source: "powermetrics, CPU + GPU + ANE".to_owned() })
            }
        }
    }
}

impl Zone {
    /// The counter starts again at its range.
    fn used_uj(&self, now_uj: u64) -> u64 {
        if now_uj >= self.start_uj { now_uj - self.start_uj } else { self.range_uj - self.start_uj + now_uj }
    }
}

/// The packages below /sys/class/powercap that can be read, each with its counter. Parts of packages have two
/// numbers in their names and are counted in them already.
#[cfg(any(not(target_os = "macos"), test))]
fn packages(powercap: &Path) -> Vec<Zone> {
    let Ok(entries) = std::fs::read_dir(powercap) else { return Vec::new() };
    let zone = |dir: PathBuf| {
        let name = dir.file_name()?.to_str()?.to_owned();
        let number_of_package = name.strip_prefix("intel-rapl:")?;
        if number_of_package.contains(':') {
            return None;
        }
        let (start_uj, range_uj) =
            (number(&dir.join("energy_uj"))?, number(&dir.join("max_energy_range_uj"))?);
        Some(Zone { dir, start_uj, range_uj })
    };
    let mut zones: Vec<Zone> = entries.flatten().filter_map(|entry| zone(entry.path())).collect();
    zones.sort_by(|a, b| a.dir.cmp(&b.dir));
    zones
}

fn number(file: &Path) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(target_os = "macos")]
fn power_metrics() -> Option<Meter> {
    use std::process::{Command, Stdio};
    // -n: asks for no password; without one it is not there
    let mut child = Command::new("sudo")
        .args(["-n", "powermetrics", "--samplers", "cpu_power", "-i", "500"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let Ok(None) = child.try_wait() else { return None };
    let mut stdout = child.stdout.take()?;
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = std::io::Read::read_to_end(&mut stdout, &mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    Some(Meter::PowerMetrics(child, reader))
}

/// The samples of `powermetrics --samplers cpu_power`: each has a head with how long it lasted and a line with the
/// mean power.
#[cfg(any(target_os = "macos", test))]
fn sum_power_metrics(text: &str) -> Option<f64> {
    let mut joules = 0.0;
    let mut elapsed_ms = None;
    let mut samples = 0;
    for line in text.lines() {
        if let Some((_, rest)) =
            line.split_once("ms elapsed)").map(|(head, _)| head).and_then(|h| h.rsplit_once('('))
        {
            elapsed_ms = rest.trim().parse::<f64>().ok();
        } else if let Some(power) = line.strip_prefix("Combined Power (CPU + GPU + ANE):") {
            let milliwatt: f64 = power.trim().strip_suffix("mW")?.trim().parse().ok()?;
            joules += milliwatt * elapsed_ms.take()? / 1e6;
            samples += 1;
        }
    }
    (samples > 0).then_some(joules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_summed_and_a_counter_may_wrap() {
        let root = tempfile::tempdir().unwrap();
        for (name, uj) in
            [("intel-rapl:0", 900u64), ("intel-rapl:1", 100), ("intel-rapl:0:0", 5), ("dtpm", 7)]
        {
            let dir = root.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("energy_uj"), format!("{uj}\n")).unwrap();
            std::fs::write(dir.join("max_energy_range_uj"), "1000\n").unwrap();
        }
        let zones = packages(root.path());
        assert_eq!(zones.len(), 2, "{zones:?}");
        std::fs::write(root.path().join("intel-rapl:0/energy_uj"), "50").unwrap();
        std::fs::write(root.path().join("intel-rapl:1/energy_uj"), "350").unwrap();
        let energy = Meter::Rapl(zones).finish().unwrap();
        assert!((energy.joules - 400e-6).abs() < 1e-12, "{energy:?}");
        assert!(packages(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn power_is_summed_over_the_time_of_its_sample() {
        let text = "*** Sampled system activity (Sun Nov 22 14:00:00 2026 +0000) (500.00ms elapsed) ***\n\
                    CPU Power: 100 mW\nCombined Power (CPU + GPU + ANE): 4000 mW\n\
                    *** Sampled system activity (Sun Nov 22 14:00:01 2026 +0000) (250.00ms elapsed) ***\n\
                    Combined Power (CPU + GPU + ANE): 8000 mW\n";
        assert_eq!(sum_power_metrics(text), Some(4.0));
        assert_eq!(sum_power_metrics("sudo: a password is required"), None);
    }
}
