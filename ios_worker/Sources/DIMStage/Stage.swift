// What a connection drives: a loaded slice with its KV cache. The connection keeps the books (which session is how
// long); a stage is handed rows that fit them.
import DIMWire

/// What a stage is, as terms need it.
public struct StageShape: Equatable, Sendable {
    public var arch = ""
    /// blocks of the whole model
    public var modelBlocks = 0
    public var firstBlock = 0
    /// inclusive
    public var lastBlock = 0
    public var nEmbd = 0
    /// positions of the cache
    public var nCtx = 0
    /// positions offered to hosts, at most `nCtx`; nil = all
    public var hostContext: Int?
    public var maxRows = 512
    public var maxSessions = 4
    public var dtypes: DTypes = [.f16, .f32]
    public var model = Digest.unknown
    public var slice = Digest.unknown
    public var parameters = Digest.unknown
    public var machine = Machine()

    public init() {}
}

/// Why rows could not be evaluated.
public enum StageError: Error, Equatable, Sendable {
    /// the blocks gave values that are infinite or not a number
    case nonFinite(firstBlock: Int, lastBlock: Int, count: Int)
    /// values that came in, or would go out, are larger than the type can hold
    case overflow(block: Int, count: Int)
    case noMemory(String)
    case compute(String)

    /// As the host hears it.
    public func report(step: UInt32, worker: String) -> ErrorReport {
        var report: ErrorReport
        switch self {
        case .nonFinite(let first, let last, let count):
            let blocks = first == last ? "block \(first)" : "blocks \(first)..\(last)"
            report = ErrorReport(
                code: .nonFinite, text: "\(blocks) produced \(count) values that are not finite on \(worker) (fp16)")
            report.block = UInt32(first)
            report.count = UInt32(clamping: count)
        case .overflow(let block, let count):
            report = ErrorReport(
                code: .overflow, text: "\(count) values at block \(block) are too large for fp16 on \(worker)")
            report.block = UInt32(block)
            report.count = UInt32(clamping: count)
        case .noMemory(let text): report = ErrorReport(code: .noMemory, text: text)
        case .compute(let text): report = ErrorReport(code: .compute, text: text)
        }
        report.step = step
        return report
    }
}

/// One thread at a time calls a stage: the server has one host at a time, and its connection one thread.
public protocol Stage: AnyObject, Sendable {
    var shape: StageShape { get }

    /// A new epoch: every session is empty.
    func reset()

    /// Evaluates the rows of `step` and writes as many in the same format to `output`, (n_rows, n_embd).
    func evaluate(_ step: Step, into output: UnsafeMutableRawBufferPointer) throws(StageError)

    /// Rows of `session` at `position` and after it are forgotten.
    func rewind(session: UInt32, position: UInt32)

    func end(session: UInt32)
}
