// The command line, parsed by hand: the same words as dim-worker's.
import DIMStage
import DIMWire

struct UsageError: Error {
    let text: String
    let hint: String
}

/// A worker without a model.
struct FakeWorker {
    var shape = StageShape()
    /// gives rows back as they came, to time everything but the arithmetic
    var echoes = false
}

struct Arguments {
    var directory: String?
    var listen = "0.0.0.0:7878"
    var keyFile: String?
    var name: String?
    var context: Int?
    var pair = false
    var check = false
    var receive: String?
    var units: String?
    var verify = Verify.once
    var fake: FakeWorker?
    var help = false
    var version = false

    static let usage = """
        usage: dim-worker-swift SLICE-DIR [options]

        Serves the Core ML packages that `dim-split --coreml` wrote (STEM.middle-A..B.coreml) to dim-host: with Core ML on
        macOS, with a slow reference evaluation elsewhere. Prints `listening on ADDR:PORT` when ready.

          --listen ADDR:PORT   where to listen (0.0.0.0:7878; port 0: any)
          --key-file FILE      the pre-shared key, one line of 64 hexadecimal digits; without it, keys made by pairing
          --pair               show a pairing code (done by itself when there is no key yet)
          --name NAME          what hosts call this worker
          --ctx N              positions per session, at most what the packages were made for
          --receive DIR        take packages pushed by `dim-host push` into DIR, and serve the newest there
          --verify WHEN        compare the files with their SHA-256: once (default; again when one has changed) or always
          --check              only compare the files of SLICE-DIR, then end
          --units WHICH        macOS: cpu, gpu or ane instead of the fastest that passes the self-test
          --fake SPEC          exact integer arithmetic instead of a model, for tests of a host:
                               blocks=11..16,of=28,n_embd=3584[,echo]
          --version, --help
        """

    init(_ words: [String]) throws {
        var rest = words[...]
        func value(_ option: String) throws -> String {
            guard let value = rest.popFirst() else {
                throw UsageError(text: "\(option) needs a value", hint: "see --help")
            }
            return value
        }
        var fakeText: String?
        while let word = rest.popFirst() {
            switch word {
            case "--listen": listen = try value(word)
            case "--key-file": keyFile = try value(word)
            case "--pair": pair = true
            case "--check": check = true
            case "--name": name = try value(word)
            case "--ctx": context = try Arguments.number(try value(word), "--ctx")
            case "--receive": receive = try value(word)
            case "--units":
                let which = try value(word)
                guard ["cpu", "gpu", "ane"].contains(which) else {
                    throw UsageError(text: "--units \(which) is not known", hint: "cpu, gpu or ane")
                }
                units = which
            case "--verify":
                let when = try value(word)
                guard let known = Verify(rawValue: when) else {
                    throw UsageError(text: "--verify \(when) is not known", hint: "once or always")
                }
                verify = known
            case "--fake": fakeText = try value(word)
            case "--help", "-h": help = true
            case "--version": version = true
            case "--threads", "--gpu-layers":
                throw UsageError(
                    text: "\(word) is dim-worker's: Core ML divides the work itself",
                    hint: "leave it out, or run the GGUF slice with dim-worker")
            case _ where word.hasPrefix("-"):
                throw UsageError(text: "\(word) is not known", hint: "see --help")
            default:
                guard directory == nil else {
                    throw UsageError(text: "a second directory, \(word)", hint: "one worker serves one slice")
                }
                directory = word
            }
        }
        if let fakeText { fake = try Arguments.fake(fakeText, context: context ?? 2048) }
        guard help || version || directory != nil || receive != nil || fake != nil else {
            throw UsageError(text: "which packages?", hint: "dim-worker-swift STEM.middle-A..B.coreml; see --help")
        }
        if check, directory == nil {
            throw UsageError(text: "--check of what?", hint: "dim-worker-swift STEM.middle-A..B.coreml --check")
        }
        if keyFile != nil, pair {
            throw UsageError(text: "--pair and --key-file exclude each other", hint: "the key file is the pairing")
        }
    }

    private static func number(_ text: String, _ option: String) throws -> Int {
        guard let number = Int(text), number > 0, number < 1 << 24 else {
            throw UsageError(text: "\(option) \(text) is not a number from 1", hint: "\(option) 2048")
        }
        return number
    }

    private static func fake(_ text: String, context: Int) throws -> FakeWorker {
        let bad = UsageError(
            text: "--fake \(text) is not understood", hint: "--fake blocks=11..16,of=28,n_embd=3584")
        var fake = FakeWorker()
        var shape = StageShape()
        shape.arch = "fake"
        shape.nCtx = context
        for part in text.split(separator: ",") {
            if part == "echo" {
                fake.echoes = true
                continue
            }
            let pair = part.split(separator: "=", maxSplits: 1).map(String.init)
            guard pair.count == 2 else { throw bad }
            switch pair[0] {
            case "blocks":
                let ends = pair[1].split(separator: ".").compactMap { Int($0) }
                guard ends.count == 2 else { throw bad }
                (shape.firstBlock, shape.lastBlock) = (ends[0], ends[1])
            case "of": shape.modelBlocks = Int(pair[1]) ?? 0
            case "n_embd": shape.nEmbd = Int(pair[1]) ?? 0
            case "arch": shape.arch = pair[1]
            default: throw bad
            }
        }
        guard (1..<1 << 20).contains(shape.nEmbd), shape.firstBlock >= 0, shape.firstBlock <= shape.lastBlock,
            shape.lastBlock < shape.modelBlocks, shape.modelBlocks < 10_000
        else { throw bad }
        fake.shape = shape
        return fake
    }
}
