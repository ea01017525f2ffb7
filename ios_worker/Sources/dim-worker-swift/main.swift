// dim-worker-swift: a worker for Core ML packages on the command line. macOS evaluates them with Core ML; everywhere
// else DIMReference does, slowly, so that all of a worker but Core ML itself can be run and tested.
import DIMCoreML
import DIMCrypto
import DIMReference
import DIMServer
import DIMStage
import DIMWire
import Foundation

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

/// A failure that is not the command line's.
struct Failure: Error {
    let text: String
    let hint: String?
}

func say(_ text: String) { FileHandle.standardError.write(Data((text + "\n").utf8)) }

func keyStore(_ arguments: Arguments) throws -> any KeyStore {
    if let path = arguments.keyFile {
        guard let file = KeyFile(contentsOf: path) else {
            throw UsageError(
                text: "\(path) is no key file", hint: "one line of 64 hexadecimal digits, the same on both sides")
        }
        return file
    }
    let environment = ProcessInfo.processInfo.environment
    let base =
        environment["XDG_CONFIG_HOME"].map { URL(fileURLWithPath: $0) }
        ?? FileManager.default.homeDirectoryForCurrentUser.appendingPathComponent(".config")
    return KeyDirectory(base.appendingPathComponent("dim").appendingPathComponent("worker-swift-keys"))
}

func readManifest(_ directory: URL, _ verify: Verify) throws -> Manifest {
    do throws(ManifestError) {
        let manifest = try Manifest.read(directory)
        switch try manifest.verify(directory, verify) {
        case .compared: say("verified: every file compared with its SHA-256")
        case .stamped: say("verified: no file has changed since every byte was compared")
        }
        return manifest
    } catch {
        throw UsageError(
            text: error.description, hint: "dim-split MODEL.gguf --middle A..B --coreml writes such a directory")
    }
}

/// Loads, tests and wraps the packages of `directory`.
func load(_ directory: URL, _ arguments: Arguments) throws -> any Stage {
    let manifest = try readManifest(directory, arguments.verify)
    var shape = StageShape(manifest)
    if let context = arguments.context {
        guard context <= shape.nCtx else {
            throw UsageError(
                text: "--ctx \(context) is more than the packages' \(shape.nCtx)",
                hint: "dim-split --coreml-ctx \(context) makes larger ones")
        }
        shape.hostContext = context
    }
    let blocks = "blocks \(shape.firstBlock)..\(shape.lastBlock) of \(shown(manifest.model.name))"
    var parameters = PackagedStage.Parameters(manifest)
    #if canImport(CoreML)
        say("loading \(blocks)")
        let only = arguments.units.flatMap { ComputeUnit(rawValue: $0) }
        let loaded = try blocking {
            try await CoreMLLoader(manifest: manifest, directory: directory).load(.init(only: only)) {
                say($0.description)
            }
        }
        parameters.prefillFrom = loaded.prefillFrom
        return PackagedStage(shape: shape, parameters: parameters, packages: loaded.packages)
    #else
        guard arguments.units == nil else {
            throw UsageError(text: "--units is for macOS: there is no Core ML here", hint: "leave it out")
        }
        say("loading \(blocks) (reference evaluation: right, but slow)")
        var packages: [ReferencePackage] = []
        for index in manifest.packages.indices {
            packages.append(try ReferencePackage(manifest, index: index, directory: directory))
        }
        if let test = try SelfTest(manifest, directory: directory) {
            let result = try test.run(packages) { Double(monotonicMilliseconds()) / 1000 }
            say("self-test: \(result.sentence)")
            guard result.passes else {
                throw Failure(
                    text: "the self-test failed: this directory must not be served", hint: "make it anew with dim-split"
                )
            }
        } else {
            say("self-test: the directory has no vectors, nothing was checked")
        }
        // a chunk costs the reference as much as its rows, real or not
        parameters.prefillFrom = max(2, manifest.nPrefill / 2)
        return PackagedStage(shape: shape, parameters: parameters, packages: packages)
    #endif
}

#if canImport(CoreML)
    final class Box<R>: @unchecked Sendable {
        var result: Result<R, any Error>?
    }

    /// Waits for asynchronous work on a thread that may wait.
    func blocking<R: Sendable>(_ work: @escaping @Sendable () async throws -> R) throws -> R {
        let box = Box<R>()
        let done = DispatchSemaphore(value: 0)
        Task.detached {
            do {
                box.result = .success(try await work())
            } catch {
                box.result = .failure(error)
            }
            done.signal()
        }
        done.wait()
        // the semaphore is signalled after the result is set
        return try box.result!.get()
    }
#endif

func fakeStage(_ fake: FakeWorker) -> any Stage {
    var shape = fake.shape
    func digest(_ text: String) -> Digest { Digest(SystemPrimitives.sha256(Array(text.utf8)))! }
    shape.model = digest("dim fake model")
    shape.slice = digest("dim fake slice")
    shape.dtypes = [.f16, .f32]
    return fake.echoes ? EchoStage(shape: shape) : PackagedStage.fake(shape: shape)
}

func report(_ event: ServerEvent) {
    switch event {
    case .listening, .step, .pushing: break
    case .listenerLost: say("the listener is gone: start again")
    case .connected(let host, let address, let connection): say("\(host) (\(address)) connected, \(connection)")
    case .disconnected(let host, let why, let received, let sent):
        say("\(host): \(why); \(received) bytes in, \(sent) bytes out")
    case .refused(let address, let why): say("refused \(address): \(why)")
    case .paired(let host): say("paired with \(host)")
    case .pairingClosed: say("the pairing code is closed")
    case .pushed(let place): say("received \(place.path)")
    }
}

func run(_ arguments: Arguments) throws {
    // Signals are taken here and nowhere else: threads made from now on inherit the mask
    var signals = sigset_t()
    sigemptyset(&signals)
    sigaddset(&signals, SIGINT)
    sigaddset(&signals, SIGTERM)
    pthread_sigmask(SIG_BLOCK, &signals, nil)

    let keys = try keyStore(arguments)
    var configuration = ServerConfiguration(keys: keys)
    configuration.listen = arguments.listen
    configuration.name = arguments.name ?? ProcessInfo.processInfo.hostName
    let store = arguments.receive.map { PushStore(URL(fileURLWithPath: $0)) }
    configuration.pushStore = store
    let relay = Relay()
    configuration.report = { event in
        report(event)
        if case .pushed(let place) = event { relay.pushed(place) }
    }
    let server = Server(configuration)
    relay.onPushed = { pushed in
        do {
            // by the time that the load before it is over, another may have come
            let place = store?.complete().first ?? pushed
            server.serve(.ready(try load(place, arguments)))
            // it works: older ones only take room
            store?.dropOlder(than: place)
            say("serving \(place.lastPathComponent)")
        } catch {
            say("error: \(sentence(error))")
        }
    }

    if let fake = arguments.fake {
        server.serve(.ready(fakeStage(fake)))
    } else if let place = arguments.directory.map({ URL(fileURLWithPath: $0) }) ?? store?.complete().first {
        server.serve(.ready(try load(place, arguments)))
    }
    let address: String
    do {
        address = try server.start()
    } catch {
        throw Failure(
            text: "cannot listen on \(arguments.listen): \(error)",
            hint: error.isAddressInUse ? "another program has that port: --listen ADDR:PORT names another" : nil)
    }
    print("listening on \(address)")
    if arguments.keyFile == nil, arguments.pair || keys.keys().isEmpty {
        print("pairing code \(server.openPairing().shown) (5 minutes): dim-host pair ADDR:PORT")
    }
    fflush(nil)

    var signal: Int32 = 0
    sigwait(&signals, &signal)
    server.stop(.shuttingDown)
    // what was said is on its way
    usleep(100_000)
}

/// Loading a pushed directory takes long and must not hold up the connection that pushed it; one load at a time.
final class Relay: @unchecked Sendable {
    var onPushed: (@Sendable (URL) -> Void)?
    private let loading = NSLock()

    func pushed(_ place: URL) {
        guard let onPushed else { return }
        let thread = Thread { [loading] in loading.withLock { onPushed(place) } }
        thread.stackSize = 8 << 20
        thread.start()
    }
}

func sentence(_ error: any Error) -> String {
    switch error {
    case let error as UsageError: error.text
    case let error as Failure: error.text
    case let error as ManifestError: error.description
    case let error as StageError: error.report(step: 0, worker: "this machine").text
    default: explanation(of: error)
    }
}

do {
    let arguments = try Arguments(Array(CommandLine.arguments.dropFirst()))
    if arguments.help {
        print(Arguments.usage)
    } else if arguments.version {
        print("dim-worker-swift 0.1.0 (protocol \(protocolVersion))")
    } else if arguments.check, let directory = arguments.directory {
        _ = try readManifest(URL(fileURLWithPath: directory), arguments.verify)
    } else {
        try run(arguments)
    }
} catch let error as UsageError {
    say("error: \(error.text)\nhint: \(error.hint)")
    exit(2)
} catch let error as Failure {
    say("error: \(error.text)" + (error.hint.map { "\nhint: \($0)" } ?? ""))
    exit(1)
} catch {
    say("error: \(sentence(error))")
    exit(1)
}
