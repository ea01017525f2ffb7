// What lies on the device: verified once, room for the compiled copy, old slices that go, nothing in backups.
import DIMCrypto
import DIMStage
import DIMWire
import Foundation
import TestFixtures
import Testing

@testable import DIMServer

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

@Suite struct StorageTests {
    private func place() -> URL {
        FileManager.default.temporaryDirectory.appendingPathComponent("dim-storage-\(UUID().uuidString)")
    }

    private func weights(_ fixture: Fixture) -> URL {
        fixture.directory.appendingPathComponent(Manifest.packageName(0)).appendingPathComponent(
            Manifest.packageWeights)
    }

    @Test func aDirectoryIsReadOnceAndThenKnownByItsStamp() throws {
        let fixture = try Fixture(seed: 31, padding: 3 << 20)
        let manifest = try Manifest.read(fixture.directory)
        var read: UInt64 = 0
        #expect(try manifest.verify(fixture.directory, progress: { done, _ in read = done }) == .compared)
        #expect(read > 6 << 20)
        read = 0
        #expect(try manifest.verify(fixture.directory, progress: { done, _ in read = done }) == .stamped)
        #expect(read == 0)
        #expect(try manifest.verify(fixture.directory, .always, progress: { done, _ in read = done }) == .compared)
        #expect(read > 6 << 20)
    }

    @Test func aFileThatChangedIsReadAgain() throws {
        let fixture = try Fixture(seed: 32)
        let manifest = try Manifest.read(fixture.directory)
        try manifest.verify(fixture.directory)
        // the same bytes as another file, as a copy is
        let file = weights(fixture)
        let content = try Data(contentsOf: file)
        try content.write(to: file, options: .atomic)
        #expect(try manifest.verify(fixture.directory) == .compared)
        #expect(try manifest.verify(fixture.directory) == .stamped)
        // other bytes in the same file, of the same length
        let open = try RawFile(file, writing: true)
        try open.seek(to: 70)
        try open.write([content[70] ^ 1][...])
        #expect(throws: ManifestError.self) { try manifest.verify(fixture.directory) }
        // and it stays refused
        #expect(throws: ManifestError.self) { try manifest.verify(fixture.directory) }
        try open.seek(to: 70)
        try open.write([content[70]][...])
        #expect(try manifest.verify(fixture.directory) == .compared)
    }

    @Test func anotherManifestOrABrokenStampFitsNothing() throws {
        let fixture = try Fixture(seed: 33)
        let manifest = try Manifest.read(fixture.directory)
        try manifest.verify(fixture.directory)
        let stamp = fixture.directory.appendingPathComponent(Manifest.stampName)
        try Data("{\"files\":[]}".utf8).write(to: stamp)
        #expect(try manifest.verify(fixture.directory) == .compared)
        var text = try String(contentsOf: stamp, encoding: .utf8)
        text = text.replacingOccurrences(
            of: manifest.packages[0].files[2].sha256, with: String(repeating: "0", count: 64))
        try Data(text.utf8).write(to: stamp)
        #expect(try manifest.verify(fixture.directory) == .compared)
        try FileManager.default.removeItem(at: stamp)
        #expect(try manifest.verify(fixture.directory) == .compared)
    }

    @Test func roomIsAskedForTheCompiledCopyToo() throws {
        let fixture = try Fixture(seed: 34, padding: 8 << 20)
        let root = place()
        defer { try? FileManager.default.removeItem(at: root) }
        let offer = try PushTests.offer(fixture).0
        let once = offer.items.reduce(UInt64(0)) { $0 + $1.size }
        // enough for what comes, not for what is made of it
        let tight = PushStore(root, freeBytes: { _ in once + (70 << 20) })
        do throws(PushStore.Failure) {
            _ = try tight.begin(offer)
            Issue.record("taken")
        } catch {
            guard case .space(let text) = error else {
                Issue.record("\(error)")
                return
            }
            #expect(text.contains("compiled copy"))
        }
        let roomy = PushStore(root, freeBytes: { _ in 2 * once + (70 << 20) })
        #expect(try roomy.begin(offer).count == offer.items.count)
    }

    @Test func olderSlicesGoWhenOneWorks() throws {
        let root = place()
        defer { try? FileManager.default.removeItem(at: root) }
        let store = PushStore(root)
        var places: [URL] = []
        for seed in [35, 36, 37] {
            let (offer, files) = try PushTests.offer(try Fixture(seed: UInt64(seed)))
            _ = try store.begin(offer)
            for (index, file) in files.enumerated() {
                _ = try store.write(PushData(item: UInt16(index), offset: 0, bytes: [UInt8](file)[...]))
            }
            places.append(try store.finish())
            usleep(20_000)
        }
        #expect(store.complete().map(\.lastPathComponent) == places.reversed().map(\.lastPathComponent))
        // a stamp, or anything else put beside the manifest, makes no older slice the newest
        try Manifest.read(places[0]).verify(places[0])
        #expect(store.complete().first?.lastPathComponent == places[2].lastPathComponent)
        #expect(store.slices().allSatisfy { $0.bytes > 1000 })

        let copied = place()
        try FileManager.default.createDirectory(at: copied, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: copied) }
        // a slice of another place is not the store's: nothing goes for it, and it cannot be deleted here
        store.dropOlder(than: copied)
        #expect(store.complete().count == 3)
        #expect(throws: (any Error).self) { try store.remove(copied) }
        #expect(FileManager.default.fileExists(atPath: copied.path))

        // one that came while the second was being loaded stays
        store.dropOlder(than: places[1])
        #expect(store.complete().map(\.lastPathComponent) == [places[2], places[1]].map(\.lastPathComponent))
        store.dropOlder(than: places[2])
        #expect(store.complete().map(\.lastPathComponent) == [places[2].lastPathComponent])
        try store.remove(places[2])
        #expect(store.complete().isEmpty)
    }

    @Test func whatIsPushedIsInNoBackup() throws {
        let root = place()
        defer { try? FileManager.default.removeItem(at: root) }
        let excluded = Locked<[URL]>([])
        let store = PushStore(root, exclude: { url in excluded.withLock { $0.append(url) } })
        _ = try store.begin(try PushTests.offer(try Fixture(seed: 38)).0)
        #expect(excluded.withLock { $0 } == [root])
        #expect(FileManager.default.fileExists(atPath: root.path))
    }

    @Test func theNewestOfTwoPlacesIsServed() throws {
        let (pushed, copied) = (place(), place())
        defer { for url in [pushed, copied] { try? FileManager.default.removeItem(at: url) } }
        #expect(SliceDirectory.newest(in: [pushed, copied]) == nil)
        for (index, parent) in [pushed, copied, pushed].enumerated() {
            let directory = parent.appendingPathComponent("middle-\(index)")
            try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
            // half a copy: no manifest yet
            #expect(SliceDirectory.newest(in: [directory.deletingLastPathComponent()])?.url != directory)
            try Data("{}".utf8).write(to: directory.appendingPathComponent(Manifest.fileName))
            #expect(SliceDirectory.newest(in: [pushed, copied])?.url.path == directory.path)
            usleep(20_000)
        }
    }
}
