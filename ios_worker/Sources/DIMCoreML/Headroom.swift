// What the process may still allocate before the system ends it without a word.
#if canImport(UIKit)
    import os
#endif

public enum Headroom {
    /// Bytes; nil where the system has no such limit (macOS, Linux).
    public static func bytes() -> UInt64? {
        #if canImport(UIKit)
            return UInt64(os_proc_available_memory())
        #else
            return nil
        #endif
    }

    /// What loading on `unit` takes of it: on the GPU and the CPU the weights count, on the Neural Engine hardly.
    static func needed(_ unit: ComputeUnit, weights: UInt64, states: UInt64) -> UInt64 {
        states + (unit == .ane ? weights / 20 : weights) + reserve
    }

    /// for the screen, the sockets and a second wind: bytes
    private static let reserve: UInt64 = 150 << 20
}
