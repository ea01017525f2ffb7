// What the process may still allocate before the system ends it without a word, and what it takes.
import DIMStage

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

// iOS, iPadOS, visionOS. Elsewhere the call is missing, or not to be relied on.
#if canImport(UIKit) && !os(tvOS) && !os(watchOS) && !targetEnvironment(macCatalyst)
    import os

    private func available() -> Int { os_proc_available_memory() }
#else
    private func available() -> Int { 0 }
#endif

public enum Headroom {
    /// Bytes; nil where the system has no such limit (macOS, Linux, the simulator, an iPad app on a Mac).
    public static func bytes() -> UInt64? { meaning(of: available()) }

    /// What the system's answer says. 0 is "this process is no app with a limit", not "nothing is left".
    static func meaning(of available: Int) -> UInt64? { available > 0 ? UInt64(available) : nil }

    /// What the system lets this process have in all: what it takes and what is left. nil without a limit.
    public static func limit() -> UInt64? {
        guard let left = bytes(), let taken = footprint() else { return nil }
        return left + taken
    }

    /// What the system counts as this process's memory: bytes; nil if it does not say.
    public static func footprint() -> UInt64? {
        #if canImport(Darwin)
            var info = task_vm_info_data_t()
            let words = MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size
            var count = mach_msg_type_number_t(words)
            let result = withUnsafeMutablePointer(to: &info) { pointer in
                pointer.withMemoryRebound(to: integer_t.self, capacity: words) {
                    task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
                }
            }
            return result == KERN_SUCCESS ? UInt64(info.phys_footprint) : nil
        #else
            return nil
        #endif
    }

    /// What loading takes of it, at its highest.
    ///
    /// The Neural Engine keeps weights in memory of its own, but while a package is loaded and compiled for it the
    /// process holds it once and most of it again. On the GPU and the CPU the weights stay, once for each function:
    /// `decode` and `prefill` are two models, even over one file.
    /// - Parameters:
    ///   - weights: of all packages
    ///   - largest: of the largest package
    static func needed(
        _ unit: ComputeUnit, weights: UInt64, largest: UInt64, states: UInt64, withPrefill: Bool
    ) -> UInt64 {
        let held = unit == .ane ? largest * 17 / 10 : weights * (withPrefill ? 2 : 1)
        return held + states + reserve
    }

    /// for the screen, the sockets and a second wind: bytes
    static let reserve: UInt64 = 150 << 20
}
