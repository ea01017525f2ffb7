// Compiled copies with a compiler that copies the weights, as Apple's was seen to do; and what errors are called.
import DIMCrypto
import DIMStage
import Foundation
import TestFixtures
import Testing

@testable import DIMCoreML

@Suite struct CompiledTests {
    private func place() -> URL {
        FileManager.default.temporaryDirectory.appendingPathComponent("dim-compiled-\(UUID().uuidString)")
    }

    /// What `MLModel.compileModel(at:)` leaves: a program and the weights once more.
    private func compile(_ package: URL, altering: Bool = false) throws -> URL {
        let compiled = place()
        let weights = compiled.appendingPathComponent("weights")
        try FileManager.default.createDirectory(at: weights, withIntermediateDirectories: true)
        try Data("mil".utf8).write(to: compiled.appendingPathComponent("model.mil"))
        var content = try Data(contentsOf: package.appendingPathComponent(Manifest.packageWeights))
        if altering { content[100] ^= 1 }
        try content.write(to: weights.appendingPathComponent("weight.bin"))
        return compiled
    }

    @Test func theWeightsAreOnTheDeviceOnce() async throws {
        let fixture = try Fixture(seed: 41, padding: 1 << 20)
        let manifest = try Manifest.read(fixture.directory)
        try manifest.verify(fixture.directory)
        let support = place()
        defer { try? FileManager.default.removeItem(at: support) }
        let cache = CompiledCache(manifest, in: support)
        let excluded = Locked<[URL]>([])
        var reported: [Int] = []
        let made = try await cache.packages(
            of: fixture.directory, compile: { try compile($0) },
            exclude: { url in excluded.withLock { $0.append(url) } }, report: { reported.append($0) })
        #expect(reported == [0, 1])
        #expect(excluded.withLock { $0 } == [cache.directory])
        for (index, compiled) in made.enumerated() {
            let source = fixture.directory.appendingPathComponent(Manifest.packageName(index))
                .appendingPathComponent(Manifest.packageWeights)
            let copy = compiled.appendingPathComponent("weights/weight.bin")
            #expect(FileIdentity(copy)?.inode == FileIdentity(source)?.inode)
            #expect(try String(contentsOf: compiled.appendingPathComponent("model.mil"), encoding: .utf8) == "mil")
        }
        // the source is what it was, and known to be
        #expect(try manifest.verify(fixture.directory) == .stamped)
        // and is compiled once, whatever the system's version is by then
        _ = try await cache.packages(
            of: fixture.directory, compile: { try compile($0) },
            report: { _ in Issue.record("compiled again") })
        // the compiled copy keeps the bytes if the source goes
        try FileManager.default.removeItem(at: fixture.directory)
        #expect((FileIdentity(made[0].appendingPathComponent("weights/weight.bin"))?.bytes ?? 0) > 1 << 20)
    }

    @Test func otherBytesAreLeftAlone() async throws {
        let fixture = try Fixture(seed: 42)
        let manifest = try Manifest.read(fixture.directory)
        let support = place()
        defer { try? FileManager.default.removeItem(at: support) }
        let made = try await CompiledCache(manifest, in: support).packages(
            of: fixture.directory, compile: { try compile($0, altering: true) }, report: { _ in })
        let source = fixture.directory.appendingPathComponent(Manifest.packageName(0))
            .appendingPathComponent(Manifest.packageWeights)
        let copy = made[0].appendingPathComponent("weights/weight.bin")
        #expect(FileIdentity(copy)?.inode != FileIdentity(source)?.inode)
        #expect(try Data(contentsOf: copy) != Data(contentsOf: source))
    }

    @Test func compiledCopiesOfOtherSlicesGo() async throws {
        let support = place()
        defer { try? FileManager.default.removeItem(at: support) }
        for seed in [43, 44] {
            let fixture = try Fixture(seed: UInt64(seed))
            _ = try await CompiledCache(try Manifest.read(fixture.directory), in: support).packages(
                of: fixture.directory, compile: { try compile($0) }, report: { _ in })
        }
        #expect(try FileManager.default.contentsOfDirectory(atPath: support.path).count == 1)
    }

    @Test func errorsAreSentences() {
        let core = "com.apple.CoreML"
        func error(_ text: String, _ code: Int, inner: NSError? = nil) -> NSError {
            var info: [String: Any] = [NSLocalizedDescriptionKey: text]
            if let inner { info[NSUnderlyingErrorKey] = inner }
            return NSError(domain: core, code: code, userInfo: info)
        }
        let table: [(any Error, String)] = [
            (StageError.compute("Core ML: no room"), "Core ML: no room"),
            (StageError.compute("Core ML: ANECCompile() FAILED"), "the Neural Engine refused the program (11)"),
            (ManifestError("x is missing"), "x is missing"),
            (
                error("Failed to build the model execution plan using a model architecture file", -14),
                "the system could not plan the program (-14)"
            ),
            (
                error("Unable to load model", 0, inner: error("E5RT: ANECCompile(...) FAILED", 11)),
                "the Neural Engine refused the program (11)"
            ),
            (
                error("Program Inference error status=0x1d", 0),
                "the Neural Engine stopped while it ran the program (0x1d)"
            ),
            (error("The file is gone.", 260), "The file is gone. (260)"),
        ]
        for (error, wanted) in table {
            let text = explanation(of: error)
            #expect(text == wanted)
            // no case names, no parentheses of an enumeration
            #expect(!text.contains("compute(") && !text.contains("Error Domain"))
        }
    }
}
