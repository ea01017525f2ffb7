// Terms: what a host expects and a worker holds, how the two are compared, what they then agree on
// (docs/PROTOCOL.md sections 5.1 and 6). Both sides hold both terms and run the same comparison.

/// Types of hidden rows, as a set.
public struct DTypes: OptionSet, Sendable, Hashable {
    public let rawValue: UInt8
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    public static let f16 = DTypes(rawValue: 1)
    public static let f32 = DTypes(rawValue: 2)

    /// The one type there is, or nil if there are none or several.
    public var single: DType? {
        switch self {
        case .f16: .f16
        case .f32: .f32
        default: nil
        }
    }
}

/// The type of an element of hidden rows. The raw value is the row format; 3 and the bit 0x80 are retired.
public enum DType: UInt8, Sendable, CaseIterable {
    case f16 = 1
    case f32 = 2

    /// bytes per element
    public var width: Int { self == .f32 ? 4 : 2 }
}

public struct Features: OptionSet, Sendable, Hashable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    public static let push = Features(rawValue: 2)
    /// to come: rows of a STEP one by one
    public static let exact = Features(rawValue: 4)
}

/// What a worker computes with, for people and for who plans; nothing of it is agreed on.
public struct Machine: Hashable, Sendable {
    public enum Engine: UInt8, Sendable, CaseIterable {
        case notSaid = 0
        case llamaCpp = 1
        case coreML = 2
    }

    public enum Unit: UInt8, Sendable, CaseIterable {
        case notSaid = 0
        case cpu = 1
        case gpu = 2
        case neuralEngine = 3
    }

    public var engine: Engine = .notSaid
    public var unit: Unit = .notSaid
    /// memory offered for slices and caches, MiB; nil = not said
    public var budget: UInt32?
    /// rows of the step that was measured; 0 = none was
    public var measuredRows: UInt32 = 0
    /// what it took on all blocks of the slice
    public var measuredMicroseconds: UInt32 = 0

    public init() {}

    fileprivate init(from reader: inout Reader) throws(RuleBroken) {
        let engine = try reader.u8()
        let unit = try reader.u8()
        guard let knownEngine = Engine(rawValue: engine) else { throw RuleBroken(.badValue, "engine \(engine)") }
        guard let knownUnit = Unit(rawValue: unit) else { throw RuleBroken(.badValue, "unit \(unit)") }
        self.engine = knownEngine
        self.unit = knownUnit
        // the interval of ticks, to come
        try reader.zeros(2)
        let budget = try reader.u32()
        self.budget = budget == .max ? nil : budget
        measuredRows = try reader.u32()
        measuredMicroseconds = try reader.u32()
    }

    fileprivate func write(to writer: inout Writer) {
        writer.u8(engine.rawValue)
        writer.u8(unit.rawValue)
        writer.u16(0)
        writer.u32(budget ?? .max)
        writer.u32(measuredRows)
        writer.u32(measuredMicroseconds)
    }
}

public enum SliceRole: UInt8, Sendable, CaseIterable {
    case none = 0
    case head = 1
    case middle = 2
    case tail = 3
}

/// 32 bytes that identify something; all zero = not known.
public struct Digest: Hashable, Sendable, CustomStringConvertible {
    public static let unknown = Digest([UInt8](repeating: 0, count: 32))!

    public let bytes: [UInt8]

    public init?(_ bytes: [UInt8]) {
        guard bytes.count == 32 else { return nil }
        self.bytes = bytes
    }

    public var isKnown: Bool { bytes.contains { $0 != 0 } }
    public var description: String { bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined() }
}

/// What one side says about itself. Numbers are as on the wire; a worker without a slice has role `none` and zeros.
public struct Terms: Hashable, Sendable {
    public var version: UInt16 = protocolVersion
    public var dtypes: DTypes = []
    public var role: SliceRole = .none
    public var features: Features = []
    public var instance: UInt64 = 0
    public var modelBlocks: UInt32 = 0
    public var firstBlock: UInt32 = 0
    public var lastBlock: UInt32 = 0
    public var nCtx: UInt32 = 0
    public var maxRows: UInt32 = 0
    public var maxSessions: UInt32 = 0
    public var maxInFlight: UInt32 = 0
    /// rows that a session can be rewound by, or has to be; max = any
    public var takeBack: UInt32 = 0
    public var machine = Machine()
    public var model: Digest = .unknown
    public var slice: Digest = .unknown
    public var parameters: Digest = .unknown
    /// of what a row in means
    public var input: Digest = .unknown
    /// of what a row out means
    public var output: Digest = .unknown
    public var shape = Shape()
    public var arch: String = ""
    public var software: String = ""
    public var name: String = ""

    public init() {}

    init(from reader: inout Reader) throws(RuleBroken) {
        version = try reader.u16()
        dtypes = DTypes(rawValue: try reader.u8())
        guard dtypes.isSubset(of: [.f16, .f32]) else {
            throw RuleBroken(.badValue, "row types \(dtypes.rawValue)")
        }
        let role = try reader.u8()
        guard let known = SliceRole(rawValue: role) else { throw RuleBroken(.badValue, "role \(role)") }
        self.role = known
        features = Features(rawValue: try reader.u32())
        instance = try reader.u64()
        modelBlocks = try reader.u32()
        firstBlock = try reader.u32()
        lastBlock = try reader.u32()
        nCtx = try reader.u32()
        maxRows = try reader.u32()
        maxSessions = try reader.u32()
        maxInFlight = try reader.u32()
        takeBack = try reader.u32()
        machine = try Machine(from: &reader)
        model = Digest(try reader.array(32))!
        slice = Digest(try reader.array(32))!
        parameters = Digest(try reader.array(32))!
        input = Digest(try reader.array(32))!
        output = Digest(try reader.array(32))!
        shape = try Shape(from: &reader)
        arch = try reader.string(atMost: Limit.arch)
        software = try reader.string(atMost: Limit.name)
        name = try reader.string(atMost: Limit.name)
        // the next hop, to come
        try reader.zeros(2)
    }

    func write(to writer: inout Writer) {
        writer.u16(version)
        writer.u8(dtypes.rawValue)
        writer.u8(role.rawValue)
        writer.u32(features.rawValue)
        writer.u64(instance)
        writer.u32(modelBlocks)
        writer.u32(firstBlock)
        writer.u32(lastBlock)
        writer.u32(nCtx)
        writer.u32(maxRows)
        writer.u32(maxSessions)
        writer.u32(maxInFlight)
        writer.u32(takeBack)
        machine.write(to: &writer)
        for digest in [model, slice, parameters, input, output] { writer.array(digest.bytes) }
        shape.write(to: &writer)
        writer.string(arch, atMost: Limit.arch)
        writer.string(software, atMost: Limit.name)
        writer.string(name, atMost: Limit.name)
        writer.u16(0)
    }
}

/// The terms do not fit: the first reason in the order of PROTOCOL.md, and a sentence with both values.
public struct Mismatch: Error, Equatable, Sendable {
    public let reason: RefusalReason
    public let text: String
}

/// What both sides computed from both terms.
public struct Agreed: Equatable, Sendable {
    public let version: UInt16
    public let dtype: DType
    public let features: Features
    public let shape: Shape
    public let firstBlock: UInt32
    public let lastBlock: UInt32
    public let nCtx: UInt32
    public let maxRows: UInt32
    public let maxSessions: UInt32
    public let maxInFlight: UInt32
    public let takeBack: UInt32

    /// Compares `host`'s terms with `worker`'s on a connection of version `chosen`; throws the first mismatch.
    public init(host: Terms, worker: Terms, chosen: UInt16) throws(Mismatch) {
        if let first = Agreed.mismatches(host: host, worker: worker, chosen: chosen).first { throw first }
        version = chosen
        // no mismatch: there is exactly one
        dtype = host.dtypes.single ?? .f16
        features = host.features.intersection(worker.features)
        shape = worker.shape
        firstBlock = host.firstBlock
        lastBlock = host.lastBlock
        nCtx = host.nCtx
        maxRows = min(host.maxRows, worker.maxRows)
        maxSessions = host.maxSessions
        maxInFlight = min(host.maxInFlight, worker.maxInFlight)
        takeBack = worker.takeBack
    }

    /// Everything in which two terms do not fit, in the order of PROTOCOL.md; both sides come to the same list.
    public static func mismatches(host: Terms, worker: Terms, chosen: UInt16) -> [Mismatch] {
        var list: [Mismatch] = []
        func refuse(_ reason: RefusalReason, if broken: Bool, _ text: @autoclosure () -> String) {
            if broken { list.append(Mismatch(reason: reason, text: text())) }
        }

        refuse(
            .version, if: host.version != worker.version || host.version != chosen,
            "the host speaks version \(host.version), the worker \(worker.version), agreed was \(chosen): update "
                + (host.version < worker.version ? "the host" : "the worker"))
        refuse(.noSlice, if: worker.role == .none, "the worker has no slice: give it one")
        refuse(
            .arch, if: host.arch != worker.arch,
            "the host has a \(shown(host.arch)) model, the worker a slice of a \(shown(worker.arch)) model")
        refuse(
            .model, if: host.model != worker.model || !host.model.isKnown,
            "the host runs model \(host.model.short), the worker holds a slice of model \(worker.model.short)")
        refuse(
            .parameters, if: !host.parameters.agrees(with: worker.parameters),
            "the same weights with other settings (rope, norms): split the model again")
        refuse(
            .modelBlocks, if: host.modelBlocks != worker.modelBlocks,
            "the host's model has \(host.modelBlocks) blocks, the worker's slice is from one of \(worker.modelBlocks)")
        refuse(
            .layout, if: !worker.hasRows || (host.shape.isKnown && host.shape != worker.shape),
            "the host's rows are \(host.rows), the worker's \(worker.rows): use slices of one split on both sides, "
                + "and give the worker the right one")
        refuse(
            .layout,
            if: list.last?.reason != .layout
                && !(host.input.agrees(with: worker.input) && host.output.agrees(with: worker.output)),
            "host and worker mean other tensors by the same rows: use slices of one split and one version of DIM on "
                + "both sides; update the older")
        refuse(
            .role, if: host.role != worker.role,
            "the host needs a \(host.role) slice, the worker holds a \(worker.role)")
        refuse(
            .blocks,
            if: host.firstBlock != worker.firstBlock || host.lastBlock != worker.lastBlock
                || host.firstBlock > host.lastBlock || host.lastBlock >= host.modelBlocks,
            "the host needs blocks \(host.firstBlock)..\(host.lastBlock), "
                + "the worker holds \(worker.firstBlock)..\(worker.lastBlock)")
        refuse(
            .slice, if: !host.slice.agrees(with: worker.slice),
            "the worker's slice has the same blocks from another split: copy the slice again")
        let dtype = host.dtypes.single
        refuse(
            .dtype, if: dtype == nil || !worker.dtypes.isSuperset(of: host.dtypes),
            "the host wants row types \(host.dtypes.rawValue), the worker has \(worker.dtypes.rawValue): choose another "
                + "number format on the host")
        refuse(
            .context, if: host.nCtx == 0 || host.nCtx > worker.nCtx,
            "the host needs a context of \(host.nCtx), the worker serves at most \(worker.nCtx): "
                + "start the host with a smaller context or the worker with a larger one")
        refuse(
            .sessions, if: host.maxSessions == 0 || host.maxSessions > worker.maxSessions,
            "the host needs \(host.maxSessions) sessions, the worker serves at most \(worker.maxSessions)")
        refuse(
            .rows, if: host.maxRows == 0 || worker.maxRows == 0,
            "the \(host.maxRows == 0 ? "host" : "worker") allows no rows in a step")
        refuse(
            .inFlight, if: host.maxInFlight == 0 || worker.maxInFlight == 0,
            "the \(host.maxInFlight == 0 ? "host" : "worker") allows no step in flight")
        if let dtype {
            let maxRows = min(host.maxRows, worker.maxRows)
            let format = RowFormat(dtype)
            let longest = stepBytes(format, host.maxSessions, maxRows, worker.shape)
            let answer = doneBytes(format, maxRows, worker.shape)
            refuse(
                .tooLarge, if: longest == nil || answer == nil || host.maxSessions > UInt32(UInt16.max),
                "a step of \(maxRows) rows of \(worker.rows) is longer than 2 GiB: fewer rows on the host")
        }
        refuse(
            .takeBack, if: host.takeBack > worker.takeBack,
            "the host has to take back \(host.takeBack) rows of a conversation, the worker can \(worker.takeBack): "
                + "start it as it was started before, or begin anew")
        return list
    }

    /// Largest message host -> worker while serving: bytes.
    public var hostMessageLimit: Int {
        max(
            Limit.openingMessage,
            Agreed.stepBytes(RowFormat(dtype), maxSessions, maxRows, shape) ?? 0)
    }

    /// Largest message worker -> host while serving: bytes.
    public var workerMessageLimit: Int {
        max(Limit.openingMessage, Agreed.doneBytes(RowFormat(dtype), maxRows, shape) ?? 0)
    }

    /// Bytes of the longest STEP; nil if it is longer than any may be.
    private static func stepBytes(_ format: RowFormat, _ sessions: UInt32, _ rows: UInt32, _ shape: Shape) -> Int? {
        let head = UInt64(Step.headerBytes) + UInt64(Span.bytes) * UInt64(sessions)
        return longest(head + shape.tokenBytes(rows), rows, shape.input.bytes(format))
    }

    /// Bytes of the longest STEP_DONE; nil if it is longer than any may be.
    private static func doneBytes(_ format: RowFormat, _ rows: UInt32, _ shape: Shape) -> Int? {
        longest(UInt64(StepDone.headerBytes), rows, shape.output.bytes(format))
    }

    private static func longest(_ head: UInt64, _ rows: UInt32, _ rowBytes: UInt64?) -> Int? {
        // a row has at most 2^31 bytes here
        guard let rowBytes else { return nil }
        let sum = head + UInt64(rows) * rowBytes
        return sum <= Limit.stepMessage ? Int(sum) : nil
    }
}

extension Terms {
    /// The rows that a slice of this role has are said.
    fileprivate var hasRows: Bool {
        let (input, output) = (!shape.input.parts.isEmpty, !shape.output.parts.isEmpty)
        return switch role {
        case .none: true
        case .head: output
        case .middle: input && output
        case .tail: input
        }
    }

    fileprivate var rows: String {
        "\(shape.input) in and \(shape.output) out" + (shape.readsTokens ? ", with token ids" : "")
    }
}

extension Digest {
    /// Compared only if both are known.
    fileprivate func agrees(with other: Digest) -> Bool { !isKnown || !other.isKnown || self == other }

    /// The first 8 digits, for a sentence.
    fileprivate var short: String { isKnown ? String(description.prefix(8)) : "(not known)" }
}
