// Every number and name of docs/PROTOCOL.md that says how something went wrong, in one place: rules (section 11.1),
// codes of ERROR (11.2), statuses of the handshake (3.2), reasons of REFUSE (6) and of GOODBYE (5.8).

/// What a peer, or someone between, did that the protocol forbids. The raw values are the names in the golden vectors.
public enum Rule: String, Sendable, CaseIterable {
    case badMagic = "bad-magic"
    case deadline
    case badGreeting = "bad-greeting"
    case badPreamble = "bad-preamble"
    case version
    case key
    case noPairing = "no-pairing"
    case crowded
    case noiseLength = "noise-length"
    case zeroDH = "zero-dh"
    case answerChanged = "answer-changed"
    case badAnswer = "bad-answer"
    case frameLength = "frame-length"
    case badTag = "bad-tag"
    case tooLong = "too-long"
    case truncated
    case trailingBytes = "trailing-bytes"
    case unknownKind = "unknown-kind"
    case reservedNotZero = "reserved-not-zero"
    case notUTF8 = "not-utf8"
    case stringTooLong = "string-too-long"
    case badValue = "bad-value"
    case unexpected
    case session
    case sessionTwice = "session-twice"
    case position
    case context
    case stepID = "step-id"
    case spanCount = "span-count"
    case rowCount = "row-count"
    case rowFormat = "row-format"
    case inFlight = "in-flight"
    case nonFinite = "non-finite"
    case pushItems = "push-items"
    case pushOrder = "push-order"

    /// The code of the ERROR that answers it; nil where the answer is a close without a word, a status or a REFUSE.
    public var answer: ErrorCode? {
        switch self {
        case .badMagic, .deadline, .badGreeting, .badPreamble, .version, .key, .noPairing, .crowded, .noiseLength,
            .zeroDH,
            .answerChanged, .badAnswer, .frameLength, .badTag, .pushItems:
            nil
        case .tooLong, .truncated, .trailingBytes, .unknownKind, .reservedNotZero, .notUTF8, .stringTooLong,
            .badValue:
            .malformed
        case .unexpected, .pushOrder: .unexpected
        case .session, .sessionTwice, .position, .context: .position
        case .stepID, .spanCount, .rowCount, .rowFormat, .inFlight: .step
        case .nonFinite: .nonFinite
        }
    }
}

/// A rule was broken: which one, and what was seen.
public struct RuleBroken: Error, Equatable, Sendable, CustomStringConvertible {
    public let rule: Rule
    public let detail: String

    public init(_ rule: Rule, _ detail: String) {
        self.rule = rule
        self.detail = detail
    }

    public var description: String { "\(rule.rawValue): \(detail)" }
}

/// `b` of ERROR.
public enum ErrorCode: UInt16, Sendable, CaseIterable {
    case malformed = 1
    case unexpected = 2
    case position = 3
    case step = 4
    case nonFinite = 5
    case overflow = 6
    case compute = 7
    case noMemory = 8
    case tooHot = 9
    case selfTest = 10
    case `internal` = 11
    case deadline = 12
    case revoked = 13

    /// A code of the wire; one that is not known means `internal`.
    public init(wire: UInt16) { self = ErrorCode(rawValue: wire) ?? .internal }
}

/// Status of the worker's answer in the handshake.
public enum HandshakeStatus: UInt8, Sendable, CaseIterable {
    case go = 0
    case version = 1
    case key = 2
    case noPairing = 3
    case crowded = 4

    /// The rule by which the refusal is reported; nil for `go`.
    public var rule: Rule? {
        switch self {
        case .go: nil
        case .version: .version
        case .key: .key
        case .noPairing: .noPairing
        case .crowded: .crowded
        }
    }
}

/// `b` of REFUSE. Up to `takeBack` they are in the order in which terms are compared.
public enum RefusalReason: UInt16, Sendable, CaseIterable {
    case version = 1
    case noSlice = 2
    case arch = 3
    case model = 4
    case parameters = 5
    case modelBlocks = 6
    case layout = 7
    case role = 8
    case blocks = 9
    case slice = 10
    case dtype = 11
    case context = 12
    case sessions = 13
    case rows = 14
    case inFlight = 15
    case tooLarge = 16
    case takeBack = 17
    case notReady = 32
    case stopping = 33
    case noMemory = 34
    case noPush = 35
    case noSpace = 36
    case pushItems = 37

    /// The name in PROTOCOL.md and in the golden vectors.
    public var name: String {
        switch self {
        case .version: "VERSION"
        case .noSlice: "NO_SLICE"
        case .arch: "ARCH"
        case .model: "MODEL"
        case .parameters: "PARAMS"
        case .modelBlocks: "N_BLOCKS"
        case .layout: "LAYOUT"
        case .role: "ROLE"
        case .blocks: "BLOCKS"
        case .slice: "SLICE"
        case .dtype: "DTYPE"
        case .context: "CONTEXT"
        case .sessions: "SESSIONS"
        case .rows: "ROWS"
        case .inFlight: "IN_FLIGHT"
        case .tooLarge: "TOO_LARGE"
        case .takeBack: "TAKE_BACK"
        case .notReady: "NOT_READY"
        case .stopping: "STOPPING"
        case .noMemory: "NO_MEMORY"
        case .noPush: "NO_PUSH"
        case .noSpace: "NO_SPACE"
        case .pushItems: "PUSH_ITEMS"
        }
    }
}

/// `b` of GOODBYE.
public enum GoodbyeReason: UInt16, Sendable, CaseIterable {
    case finished = 0
    case shuttingDown = 1
    case pausing = 2
    case replaced = 3
}
