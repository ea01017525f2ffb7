// Files pushed over real sockets: interrupted, altered, too large, hostile. A half push is never served.
import DIMCrypto
import DIMStage
import DIMWire
import Foundation
import TestFixtures
import Testing

@testable import DIMServer

@Suite(.serialized) struct PushTests {
    /// The offer for a fixture's directory, and its files in the order of the items.
    static func offer(_ fixture: Fixture) throws -> (PushOffer, [Data]) {
        let manifest = try Manifest.read(fixture.directory)
        var items: [(PushItem.Kind, Int)] = [(.directoryManifest, 0)]
        for kind in [PushItem.Kind.packageContents, .packageModel, .packageWeights] {
            items += manifest.packages.indices.map { (kind, $0) }
        }
        if manifest.selftest != nil { items.append((.selfTest, 0)) }
        var list: [PushItem] = []
        var files: [Data] = []
        for (kind, index) in items {
            let probe = PushItem(kind: kind, index: UInt8(index), size: 1, digest: .unknown)
            let data = try Data(contentsOf: fixture.directory.appendingPathComponent(PushStore.path(probe)))
            files.append(data)
            list.append(
                PushItem(
                    kind: kind, index: UInt8(index), size: UInt64(data.count),
                    digest: Digest(SystemPrimitives.sha256([UInt8](data)))!))
        }
        let shape = StageShape(manifest)
        return (
            PushOffer(
                model: shape.model, slice: shape.slice, firstBlock: UInt32(shape.firstBlock),
                lastBlock: UInt32(shape.lastBlock), items: list, name: "a host"), files
        )
    }

    private func place() -> URL {
        FileManager.default.temporaryDirectory.appendingPathComponent("dim-push-\(UUID().uuidString)")
    }

    /// Sends what the worker needs, at most `limit` bytes; then how it ended. A push that stops at the limit waits until
    /// the worker has reported so many bytes: what it has not read yet goes with the connection.
    private func push(
        _ address: String, _ offer: PushOffer, _ files: [Data], limit: Int = .max, altering: Int? = nil,
        reports: Reports? = nil
    ) throws -> Ending? {
        let host = try TestHost(address, .push(offer))
        guard let have = host.wait(for: { if case .needs(let have) = $0 { have } else { nil } }) else {
            return host.ending
        }
        var sent = 0
        for (index, file) in files.enumerated() {
            var offset = Int(have[index])
            while offset < file.count {
                let count = min(Limit.pushData, file.count - offset, limit - sent)
                if count == 0 {
                    let stored = have.reduce(0, +) + UInt64(sent)
                    func isStored(_ event: ServerEvent) -> Bool {
                        if case .pushing(let bytes, _) = event { bytes >= stored } else { false }
                    }
                    for _ in 0..<12 where reports?.eventually(isStored) == false {}
                    return nil
                }
                var piece = [UInt8](file[offset..<offset + count])
                if altering == index { piece[0] ^= 1 }
                host.say {
                    $0.pushData(
                        PushData(item: UInt16(index), offset: UInt64(offset), bytes: piece[...]),
                        now: monotonicMilliseconds())
                }
                offset += count
                sent += count
            }
        }
        return host.closed(10)
    }

    private var ok: Ending { .pushed(PushResult(outcome: .ok, item: nil, text: "")) }

    @Test func interruptedTwiceAndThenWhole() throws {
        let fixture = try Fixture(seed: 11, padding: 6_000_000)
        let root = place()
        defer { try? FileManager.default.removeItem(at: root) }
        let store = PushStore(root)
        let worker = try TestServer(stage: StageState.none, pushStore: store)
        let (offer, files) = try PushTests.offer(fixture)
        let total = files.reduce(0) { $0 + $1.count }
        for _ in 0..<2 {
            #expect(try push(worker.address, offer, files, limit: total / 3, reports: worker.reports) == nil)
            #expect(store.complete().isEmpty)
            #expect(worker.reports.eventually { if case .disconnected = $0 { true } else { false } })
            usleep(300_000)
        }
        // the third goes on where the others stopped
        let before = try TestHost(worker.address, .push(offer))
        let have = before.wait { if case .needs(let have) = $0 { have } else { nil } }
        #expect((have?.reduce(0, +) ?? 0) > UInt64(total / 2))
        before.goodbye()
        usleep(300_000)
        #expect(try push(worker.address, offer, files) == ok)
        let place = try #require(store.complete().first)
        let manifest = try Manifest.read(place)
        try manifest.verify(place)
        #expect(worker.reports.eventually { if case .pushed(let url) = $0 { url.path == place.path } else { false } })
        // nothing is left of the way there
        let incoming = try? FileManager.default.contentsOfDirectory(
            atPath: root.appendingPathComponent("incoming").path)
        #expect((incoming ?? []).isEmpty)
        // once more: nothing to send, at once
        #expect(try push(worker.address, offer, [], limit: 0) == ok)
    }

    @Test func anAlteredFileIsDroppedAndSentAgain() throws {
        let fixture = try Fixture(seed: 12)
        let root = place()
        defer { try? FileManager.default.removeItem(at: root) }
        let store = PushStore(root)
        let worker = try TestServer(stage: StageState.none, pushStore: store)
        let (offer, files) = try PushTests.offer(fixture)
        guard case .pushed(let result) = try push(worker.address, offer, files, altering: 5) else {
            Issue.record("no result")
            return
        }
        #expect(result.outcome == .hashDiffers && result.item == 5)
        #expect(store.complete().isEmpty)
        usleep(300_000)
        #expect(try push(worker.address, offer, files) == ok)
    }

    @Test func whatDoesNotFitIsRefusedFirst() throws {
        let fixture = try Fixture(seed: 13)
        let root = place()
        let store = PushStore(root, freeBytes: { _ in 74 << 20 })
        let (small, _) = try PushTests.offer(fixture)
        #expect(try store.begin(small).count == small.items.count)
        var large = small
        large.items[3].size = 10 << 20
        #expect(
            throws: PushStore.Failure.space("0.09 GB needed, half of it for the compiled copy, 0.08 GB free")
        ) { try store.begin(large) }
        try? FileManager.default.removeItem(at: root)

        let worker = try TestServer(
            stage: StageState.none, pushStore: PushStore(place(), freeBytes: { _ in 1000 }))
        guard case .refusedByPeer(let refusal) = try push(worker.address, small, []) else {
            Issue.record("not refused")
            return
        }
        #expect(refusal.reason == .noSpace)
    }

    @Test func listsThatMakeNoSliceAreRefused() throws {
        let fixture = try Fixture(seed: 14)
        let (offer, _) = try PushTests.offer(fixture)
        let store = PushStore(place())
        func refused(_ change: (inout [PushItem]) -> Void) -> Bool {
            var other = offer
            change(&other.items)
            do throws(PushStore.Failure) {
                _ = try store.begin(other)
                return false
            } catch {
                if case .items = error { return true }
                return false
            }
        }
        #expect(refused { $0.removeFirst() })
        #expect(refused { $0.removeAll { $0.kind == .packageModel } })
        #expect(refused { $0.removeAll { $0.kind == .packageWeights && $0.index == 1 } })
        #expect(refused { $0.append(PushItem(kind: .gguf, index: 0, size: 1, digest: .unknown)) })
        #expect(refused { $0.append(PushItem(kind: .selfTest, index: 3, size: 1, digest: .unknown)) })
    }

    @Test func aManifestOfAnotherSliceIsNotServed() throws {
        let fixture = try Fixture(seed: 15)
        let other = try Fixture(seed: 16)
        let root = place()
        defer { try? FileManager.default.removeItem(at: root) }
        let store = PushStore(root)
        let worker = try TestServer(stage: StageState.none, pushStore: store)
        // right hashes, but the manifest names other weights
        var (list, files) = try PushTests.offer(fixture)
        let (foreign, content) = try PushTests.offer(other)
        list.items[0] = foreign.items[0]
        files[0] = content[0]
        guard case .pushed(let result) = try push(worker.address, list, files) else {
            Issue.record("no result")
            return
        }
        #expect(result.outcome == .storingFailed)
        #expect(result.text.contains("not the file that the manifest names"))
        #expect(store.complete().isEmpty)
    }

    @Test func pathsAreMadeOfNumbers() {
        for kind in PushItem.Kind.allCases {
            for index in UInt8.min ... .max {
                let path = PushStore.path(PushItem(kind: kind, index: index, size: 1, digest: .unknown))
                #expect(!path.contains("..") && !path.hasPrefix("/"))
            }
        }
    }

    @Test func onlyOneUnfinishedPushIsKept() throws {
        let root = place()
        defer { try? FileManager.default.removeItem(at: root) }
        let store = PushStore(root)
        for seed in [17, 18, 19] { _ = try store.begin(try PushTests.offer(try Fixture(seed: UInt64(seed))).0) }
        store.end()
        let incoming = try FileManager.default.contentsOfDirectory(atPath: root.appendingPathComponent("incoming").path)
        #expect(incoming.count == 1)
    }
}
