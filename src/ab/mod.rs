//! Is the split worth it here, how much, and is the answer the same?
pub mod cgroup;
pub mod charts;
pub mod energy;
pub mod launch;
pub mod link;
pub mod machine;
pub mod quality;
pub mod record;
pub mod report;
pub mod run;
pub mod stats;
pub mod summary;
pub mod usage;
