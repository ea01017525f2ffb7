//! A memory limit for one process and its page cache, as a smaller machine would have: a memory control group of
//! Linux, version 2 or 1, whichever has the memory controller here.
//!
//! A process in the group that maps a file larger than the limit reads it from the disk again and again, as it would
//! on a machine of that size; memory that is not a file's and does not fit ends it (swap is not given).
//!
//! The page cache belongs to the group that read a page first. Files that another process has read before have to be
//! evicted before a run ([`super::machine::evict`]), or the limit would not count them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A group with a limit. Dropping it removes it; the processes in it have to be gone by then.
#[derive(Debug)]
pub struct MemoryGroup {
    dir: PathBuf,
    version: Version,
    limit_bytes: u64,
}

/// Why there is no group.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// Not on this system.
    #[error("this system has no memory control groups{0}")]
    NoController(&'static str),
    /// Not for this user.
    #[error("no permission to make a memory control group in {}: {source}", .dir.display())]
    NotPermitted {
        /// Where it was tried last.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else.
    #[error("cannot write {}: {source}", .file.display())]
    Io {
        /// The file of the group.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl GroupError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            GroupError::NoController(_) => {
                "leave out --memory-limit: then this machine's own memory is the limit"
            }
            GroupError::NotPermitted { .. } => {
                "run as root, or with a group of your own: \
                 systemd-run --user --scope -p Delegate=yes dim-host ab ..."
            }
            GroupError::Io { .. } => {
                "the limit may be smaller than what is in use, or larger than the group above allows"
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Where groups can be made on this system.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    /// this process's own group below it, without the first slash
    own: PathBuf,
    version: Version,
}

impl MemoryGroup {
    /// Makes a group for `limit_bytes` of memory, page cache included.
    pub fn new(limit_bytes: u64) -> Result<MemoryGroup, GroupError> {
        if !cfg!(target_os = "linux") {
            return Err(GroupError::NoController(": here the machine's own memory is the limit"));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let hierarchy = Hierarchy::find(&mounts, &own, |dir| {
            fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default()
        });
        MemoryGroup::new_in(&hierarchy.ok_or(GroupError::NoController(""))?, limit_bytes)
    }

    fn new_in(hierarchy: &Hierarchy, limit_bytes: u64) -> Result<MemoryGroup, GroupError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dim-ab-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // beside everything when that is allowed, else inside the group that was delegated to this process
        let parents = [hierarchy.mount.clone(), hierarchy.mount.join(&hierarchy.own)];
        let mut refused = None;
        for parent in parents {
            if hierarchy.version == Version::Two
                && let Err(e) = give_memory_to_children(&parent)
            {
                refused = Some((parent, e));
                continue;
            }
            let dir = parent.join(&name);
            match fs::create_dir(&dir) {
                Ok(()) => {
                    let group = MemoryGroup { dir, version: hierarchy.version, limit_bytes };
                    group.limit()?;
                    return Ok(group);
                }
                Err(e) => refused = Some((parent, e)),
            }
        }
        let (dir, source) = refused.expect("both parents were tried");
        Err(GroupError::NotPermitted { dir, source })
    }

    fn limit(&self) -> Result<(), GroupError> {
        let bytes = self.limit_bytes.to_string();
        let (limit, swap) = match self.version {
            Version::Two => ("memory.max", ("memory.swap.max", "0")),
            Version::One => ("memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", bytes.as_str())),
        };
        let file = self.dir.join(limit);
        fs::write(&file, &bytes).map_err(|source| GroupError::Io { file, source })?;
        // a kernel without swap accounting has no such file; then there is nothing to forbid here
        let file = self.dir.join(swap.0);
        if file.exists() {
            fs::write(&file, swap.1).map_err(|source| GroupError::Io { file, source })?;
        }
        Ok(())
    }

    /// The file a process writes its own number to, to be in this group.
    pub fn procs_file(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// The limit.
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Most memory the group has used at once, page cache included; `None` where the kernel does not say.
    pub fn peak_bytes(&self) -> Option<u64> {
        self.number(match self.version {
            Version::Two => "memory.peak",
            Version::One => "memory.max_usage_in_bytes",
        })
    }

    /// How many processes of the group the kernel has ended for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = match self.version {
            Version::Two => "memory.events",
            Version::One => "memory.oom_control",
        };
        let text = fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        field(&text, "oom_kill").unwrap_or(0)
    }

    /// Gives back all page cache the group holds. As far as the kernel can: a page in use stays.
    pub fn forget_cache(&self) {
        let _ = match self.version {
            Version::Two => fs::write(self.dir.join("memory.reclaim"), self.limit_bytes.to_string()),
            Version::One => fs::write(self.dir.join("memory.force_empty"), "0"),
        };
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.dir.join(file)).ok()?.trim().parse().ok()
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // the kernel takes a moment to let go of a process that has just ended
        let deadline = Instant::now() + Duration::from_secs(2);
        while let Err(e) = fs::remove_dir(&self.dir) {
            if e.kind() == io::ErrorKind::NotFound || Instant::now() > deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Hierarchy {
    /// `mounts` and `own` are /proc/self/mounts and /proc/self/cgroup; `controllers` reads cgroup.controllers of a
    /// directory.
    fn find(mounts: &str, own: &str, controllers: impl Fn(&Path) -> String) -> Option<Hierarchy> {
        let mut two = None;
        let mut one = None;
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            let (Some(at), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            let at = PathBuf::from(at);
            match kind {
                "cgroup2" if controllers(&at).split_whitespace().any(|c| c == "memory") => {
                    two = two.or(Some(at))
                }
                "cgroup" if options.split(',').any(|o| o == "memory") => one = one.or(Some(at)),
                _ => {}
            }
        }
        // lines as `4:memory:/a/b` (version 1) and `0::/a/b` (version 2)
        let own_path = |names: fn(&str) -> bool| {
            let line = own.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let (controllers, path) = (parts.next()?, parts.next()?);
                names(controllers).then(|| path.trim_start_matches('/').to_owned())
            });
            PathBuf::from(line.unwrap_or_default())
        };
        if let Some(mount) = two {
            return Some(Hierarchy { mount, own: own_path(str::is_empty), version: Version::Two });
        }
        let own = own_path(|controllers| controllers.split(',').any(|c| c == "memory"));
        one.map(|mount| Hierarchy { mount, own, version: Version::One })
    }
}

/// Version 2: a group limits its children's memory only when it says so, and then no process may be in it itself:
/// this one moves into a child of its own first, where it has to.
fn give_memory_to_children(parent: &Path) -> io::Result<()> {
    let control = parent.join("cgroup.subtree_control");
    if fs::read_to_string(&control)?.split_whitespace().any(|c| c == "memory") {
        return Ok(());
    }
    if fs::write(&control, "+memory").is_ok() {
        return Ok(());
    }
    let own = parent.join("dim-ab-self");
    match fs::create_dir(&own) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    fs::write(own.join("cgroup.procs"), std::process::id().to_string())?;
    fs::write(&control, "+memory")
}

/// The number after `name` in lines of `name number`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS_V1: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
    const MOUNTS_V2: &str = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";

    #[test]
    fn the_hierarchy_that_has_the_memory_controller_is_found() {
        let v1 = Hierarchy::find(MOUNTS_V1, "5:cpu:/\n4:memory:/a/b\n0::/\n", |_| "cpu pids".into()).unwrap();
        assert_eq!((v1.version, v1.mount.to_str().unwrap()), (Version::One, "/sys/fs/cgroup/memory"));
        assert_eq!(v1.own, Path::new("a/b"));
        let v2 =
            Hierarchy::find(MOUNTS_V2, "0::/user.slice/x.scope\n", |_| "cpuset cpu io memory pids\n".into())
                .unwrap();
        assert_eq!((v2.version, v2.mount.to_str().unwrap()), (Version::Two, "/sys/fs/cgroup"));
        assert_eq!(v2.own, Path::new("user.slice/x.scope"));
        assert_eq!(Hierarchy::find(MOUNTS_V2, "0::/\n", |_| "cpu".into()), None);
        assert_eq!(Hierarchy::find("", "", |_| "memory".into()), None);
    }

    /// Version 2 as files: what is written where. The kernel's own part is not in it.
    #[test]
    fn a_group_of_version_2_is_limited_and_gets_no_swap() {
        let root = tempfile::tempdir().unwrap();
        let control = root.path().join("cgroup.subtree_control");
        fs::write(&control, "cpu memory\n").unwrap();
        let hierarchy = Hierarchy { mount: root.path().into(), own: "x".into(), version: Version::Two };
        let group = MemoryGroup::new_in(&hierarchy, 12_000_000_000).unwrap();
        assert_eq!(fs::read_to_string(group.dir.join("memory.max")).unwrap(), "12000000000");
        fs::write(group.dir.join("memory.peak"), "4096\n").unwrap();
        fs::write(group.dir.join("memory.events"), "low 0\noom 3\noom_kill 2\n").unwrap();
        assert_eq!((group.peak_bytes(), group.oom_kills()), (Some(4096), 2));
        assert!(group.procs_file().starts_with(root.path()));
    }

    #[test]
    fn a_group_that_may_not_be_made_says_where_and_what_to_do() {
        let hierarchy =
            Hierarchy { mount: "/proc/self/nowhere".into(), own: "x".into(), version: Version::One };
        let e = MemoryGroup::new_in(&hierarchy, 1 << 30).unwrap_err();
        assert!(e.to_string().contains("/proc/self/nowhere"), "{e}");
        assert!(e.hint().contains("root"), "{}", e.hint());
    }
}
