//! Whether llama.cpp was compiled for a lesser CPU than the one it runs on.
//!
//! llama.cpp's CPU kernels are chosen when it is compiled, by the CPU that rustc is told to compile for. On x86-64 that is
//! one of 2003 unless something says otherwise, and then a token takes about ten times as long. build.rs warns, but cargo
//! shows the warnings of a git dependency's build script to nobody: a program asks here.

/// Instructions that this machine's CPU has, that make most of the difference, and that llama.cpp was compiled without.
/// Empty where there is nothing to win, and on everything but x86-64, whose compilers start from a newer CPU.
#[must_use]
pub fn unused_cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        use llama_cpp_sys_2::{ggml_cpu_has_avx2, ggml_cpu_has_f16c, ggml_cpu_has_fma};
        // SAFETY: no pointers; each returns a constant of the build.
        let (avx2, fma, f16c) = unsafe { (ggml_cpu_has_avx2(), ggml_cpu_has_fma(), ggml_cpu_has_f16c()) };
        unused([
            ("AVX2", is_x86_feature_detected!("avx2"), avx2 != 0),
            ("FMA", is_x86_feature_detected!("fma"), fma != 0),
            ("F16C", is_x86_feature_detected!("f16c"), f16c != 0),
        ])
    }
    #[cfg(not(target_arch = "x86_64"))]
    unused([])
}

/// Of (name, the machine has it, the build uses it).
fn unused<const N: usize>(features: [(&'static str, bool, bool); N]) -> Vec<&'static str> {
    features.into_iter().filter(|&(_, machine, build)| machine && !build).map(|(name, ..)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_machine_has_and_the_build_does_not_use_is_named() {
        assert_eq!(unused([("A", true, true), ("B", true, false), ("C", false, false)]), ["B"]);
    }

    /// This workspace compiles for the machine's own CPU: .cargo/config.toml.
    #[test]
    fn this_build_leaves_nothing_unused() {
        assert_eq!(unused_cpu_features(), [""; 0]);
    }
}
