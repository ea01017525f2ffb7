// The function of one package, as docs/COREML.md states it: hidden, pos, cos, sin, mask and a state in, hidden out.
// Core ML evaluates it on Apple systems, DIMReference anywhere, and FakePackage stands in for it in tests.

/// Which of a package's functions.
public enum PackageFunction: String, Sendable {
    /// one row
    case decode
    /// n_prefill rows
    case prefill
}

/// Inputs of one call. The buffers belong to the caller and live for the call.
public struct PackageInputs {
    /// T: 1 or n_prefill
    public let rows: Int
    public let hidden: UnsafeBufferPointer<Half>  // (T, n_embd)
    /// of the first row
    public let position: Int
    public let cos: UnsafeBufferPointer<Half>  // (T, head_dim)
    public let sin: UnsafeBufferPointer<Half>  // (T, head_dim)
    public let mask: UnsafeBufferPointer<Half>  // (T, n_ctx)
}

/// One session's cache in one package; what is in it is the package's business.
public protocol PackageState: AnyObject {}

public protocol Package: AnyObject {
    /// as numbered in the model, inclusive
    var blocks: ClosedRange<Int> { get }

    func makeState() throws(StageError) -> any PackageState

    /// Writes T rows to `output`, (T, n_embd).
    func evaluate(
        _ function: PackageFunction, _ inputs: PackageInputs, state: any PackageState,
        into output: UnsafeMutableBufferPointer<Half>) throws(StageError)
}
