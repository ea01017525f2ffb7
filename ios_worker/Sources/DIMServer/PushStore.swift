// Pushed packages on disk (docs/PROTOCOL.md section 9).
//
//     ROOT/incoming/PUSH-ID/NN.part      being received
//     ROOT/incoming/PUSH-ID/NN.done      complete, its SHA-256 compared
//     ROOT/middle-11..16-PUSHID/         the whole, verified and renamed into place last
//
// Every name is made here, from numbers: nothing of the wire becomes a path. Only one unfinished push is kept; another
// one takes its place. Of finished ones the newest is kept once it has been seen to work. Bytes go from the connection's
// buffer to the file and the hash, never through Foundation's data.
import DIMCrypto
import DIMStage
import DIMWire
import Foundation

public final class PushStore: @unchecked Sendable {
    public enum Failure: Error, Equatable {
        /// the list is none that this worker can use
        case items(String)
        case space(String)
        case storing(String)
        /// the item was dropped and must be sent again
        case hashDiffers(item: Int)
    }

    /// kept free beside what is received: bytes
    private static let reserve: UInt64 = 64 << 20

    private let root: URL
    private let freeBytes: @Sendable (URL) -> UInt64?
    private let exclude: @Sendable (URL) -> Void
    /// one push at a time: the server serves one host
    private var offer: PushOffer?
    private var item = -1
    private var file: RawFile?
    private var hasher: SystemPrimitives.Hasher?
    private var written: UInt64 = 0
    private var unreported: UInt64 = 0

    /// - Parameter exclude: keeps a directory out of backups
    public init(
        _ root: URL, freeBytes: @escaping @Sendable (URL) -> UInt64? = PushStore.freeBytes,
        exclude: @escaping @Sendable (URL) -> Void = { excludeFromBackup($0) }
    ) {
        self.root = root
        self.freeBytes = freeBytes
        self.exclude = exclude
    }

    /// The directories that were pushed completely, newest first.
    public func complete() -> [URL] { SliceDirectory.all(in: root).filter { isOurs($0.url) }.map(\.url) }

    /// The same with what they take.
    public func slices() -> [SliceDirectory] { SliceDirectory.all(in: root).filter { isOurs($0.url) } }

    /// Deletes a slice that was pushed. Nothing else can be deleted with it.
    public func remove(_ slice: URL) throws {
        guard isOurs(slice) else { throw Failure.storing("\(slice.lastPathComponent) was not pushed") }
        try FileManager.default.removeItem(at: slice)
    }

    /// Deletes pushed slices that are older than `slice`, which was seen to work. One that has come since stays: its turn
    /// is next. Without effect if `slice` was not pushed itself.
    public func dropOlder(than slice: URL) {
        guard isOurs(slice) else { return }
        // newest first, and by name: of one directory a URL may end in a slash and another not
        for older in complete().drop(while: { $0.lastPathComponent != slice.lastPathComponent }).dropFirst() {
            try? FileManager.default.removeItem(at: older)
        }
    }

    private func isOurs(_ url: URL) -> Bool {
        url.lastPathComponent.hasPrefix("middle-")
            && url.deletingLastPathComponent().standardizedFileURL.path == root.standardizedFileURL.path
    }

    /// Begins or goes on with a push: how many bytes of each item are there.
    func begin(_ offer: PushOffer) throws(Failure) -> [UInt64] {
        end()
        try checkItems(offer)
        self.offer = offer
        if FileManager.default.fileExists(atPath: place(offer).path) { return offer.items.map(\.size) }

        dropOthers(than: incoming(offer))
        do {
            try FileManager.default.createDirectory(at: incoming(offer), withIntermediateDirectories: true)
        } catch {
            throw .storing("\(error.localizedDescription)")
        }
        let have = offer.items.indices.map { index in
            if size(done(offer, index)) == offer.items[index].size { return offer.items[index].size }
            return min(size(part(offer, index)) ?? 0, offer.items[index].size)
        }
        exclude(root)
        try checkSpace(offer, have)
        // an item that was complete but for its comparison is finished now
        for (index, bytes) in have.enumerated()
        where bytes == offer.items[index].size && size(done(offer, index)) == nil {
            try open(index, at: bytes)
            try finishItem()
        }
        return have
    }

    /// What is missing, and as much again as the packages are: the system keeps a compiled copy of them.
    private func checkSpace(_ offer: PushOffer, _ have: [UInt64]) throws(Failure) {
        let missing = zip(offer.items, have).reduce(UInt64(0)) { $0 + $1.0.size - $1.1 }
        let compiled = offer.items.filter { $0.kind == .packageModel || $0.kind == .packageWeights }
            .reduce(UInt64(0)) { $0 + $1.size }
        let needed = missing + compiled + PushStore.reserve
        guard missing > 0, let free = freeBytes(root), free < needed else { return }
        let older = slices().reduce(UInt64(0)) { $0 + $1.bytes }
        let hint = older > 0 ? "; older slices take \(gigabytes(older)): delete them on the device" : ""
        throw .space("\(gigabytes(needed)) needed, half of it for the compiled copy, \(gigabytes(free)) free\(hint)")
    }

    /// Writes the next bytes. The connection has checked that they are the next ones.
    /// - Returns: bytes of the item stored, if that is worth saying now
    func write(_ data: PushData) throws(Failure) -> UInt64? {
        guard let offer else { throw .storing("no push is under way") }
        if Int(data.item) != item { try open(Int(data.item), at: data.offset) }
        do throws(FileError) {
            try file?.write(data.bytes)
        } catch {
            throw .storing(error.description)
        }
        data.bytes.withUnsafeBytes { hasher?.update($0) }
        written += UInt64(data.bytes.count)
        unreported += UInt64(data.bytes.count)
        if written == offer.items[item].size {
            try finishItem()
            return offer.items[Int(data.item)].size
        }
        guard unreported >= Limit.pushStoredEvery else { return nil }
        unreported = 0
        try synchronize()
        return written
    }

    /// All bytes are there: moves the whole into place.
    func finish() throws(Failure) -> URL {
        guard let offer else { throw .storing("no push is under way") }
        defer { end() }
        let target = place(offer)
        if FileManager.default.fileExists(atPath: target.path) { return target }
        let whole = incoming(offer).appendingPathComponent("whole")
        do {
            try? FileManager.default.removeItem(at: whole)
            for (index, item) in offer.items.enumerated() {
                let file = whole.appendingPathComponent(PushStore.path(item))
                try FileManager.default.createDirectory(
                    at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
                // a link, so that a failure here loses nothing
                try FileManager.default.linkItem(at: done(offer, index), to: file)
            }
        } catch {
            throw .storing("\(error.localizedDescription)")
        }
        do throws(ManifestError) {
            let manifest = try Manifest.read(whole)
            try compare(manifest, offer)
        } catch {
            throw .items(error.description)
        }
        do {
            try FileManager.default.moveItem(at: whole, to: target)
            try FileManager.default.removeItem(at: incoming(offer))
        } catch {
            throw .storing("\(error.localizedDescription)")
        }
        return target
    }

    /// Lets go of an unfinished push; what was stored stays for the next try.
    func end() {
        try? file?.synchronize()
        file = nil
        hasher = nil
        offer = nil
        item = -1
    }

    // MARK: items

    /// Where an item lies in the directory.
    static func path(_ item: PushItem) -> String {
        let package = Manifest.packageName(Int(item.index))
        return switch item.kind {
        case .directoryManifest: Manifest.fileName
        case .packageContents: "\(package)/\(Manifest.packageContents)"
        case .packageModel: "\(package)/\(Manifest.packageModel)"
        case .packageWeights: "\(package)/\(Manifest.packageWeights)"
        case .selfTest: Manifest.selfTestName
        case .gguf: "slice.gguf"
        }
    }

    private func checkItems(_ offer: PushOffer) throws(Failure) {
        func indexes(_ kind: PushItem.Kind) -> [Int] { offer.items.filter { $0.kind == kind }.map { Int($0.index) } }
        guard indexes(.gguf).isEmpty else { throw .items("this worker runs Core ML packages, not a GGUF slice") }
        guard indexes(.directoryManifest) == [0] else { throw .items("there must be one manifest") }
        let packages = indexes(.packageContents)
        guard !packages.isEmpty, packages == Array(0..<packages.count), indexes(.packageModel) == packages,
            indexes(.packageWeights) == packages
        else { throw .items("each package must have its manifest, its model and its weights") }
        guard indexes(.selfTest).allSatisfy({ $0 == 0 }) else { throw .items("there is one file of test vectors") }
    }

    /// The manifest that came names the same model, blocks and files as the offer.
    private func compare(_ manifest: Manifest, _ offer: PushOffer) throws(ManifestError) {
        let shape = StageShape(manifest)
        guard shape.model == offer.model, shape.slice == offer.slice, shape.firstBlock == Int(offer.firstBlock),
            shape.lastBlock == Int(offer.lastBlock)
        else { throw ManifestError("the manifest is of another slice than the push") }
        for item in offer.items {
            let package = Int(item.index)
            let expected: String? =
                switch item.kind {
                case .packageContents, .packageModel, .packageWeights:
                    manifest.packages.indices.contains(package)
                        ? manifest.packages[package].files.first {
                            PushStore.path(item).hasSuffix("mlpackage/" + $0.path)
                        }?.sha256 : nil
                case .selfTest: manifest.selftest?.sha256
                case .directoryManifest, .gguf: item.digest.description
                }
            guard expected == item.digest.description else {
                throw ManifestError("\(PushStore.path(item)) is not the file that the manifest names")
            }
        }
    }

    private func open(_ index: Int, at offset: UInt64) throws(Failure) {
        guard let offer else { throw .storing("no push is under way") }
        do throws(FileError) {
            let file = try RawFile(part(offer, index), writing: true)
            // what lies behind the agreed offset is not trusted
            try file.truncate(to: offset)
            try file.seek(to: 0)
            let hasher = SystemPrimitives.Hasher()
            try file.forEachPiece { hasher.update($0) }
            self.file = file
            self.hasher = hasher
        } catch {
            throw .storing(error.description)
        }
        item = index
        written = offset
        unreported = 0
    }

    private func finishItem() throws(Failure) {
        guard let offer, let hasher else { return }
        let index = item
        try synchronize()
        file = nil
        self.hasher = nil
        item = -1
        guard hasher.finish() == offer.items[index].digest.bytes else {
            try? FileManager.default.removeItem(at: part(offer, index))
            throw .hashDiffers(item: index)
        }
        do {
            try FileManager.default.moveItem(at: part(offer, index), to: done(offer, index))
        } catch {
            throw .storing("\(error.localizedDescription)")
        }
    }

    private func synchronize() throws(Failure) {
        do throws(FileError) {
            try file?.synchronize()
        } catch {
            throw .storing(error.description)
        }
    }

    // MARK: places

    private func place(_ offer: PushOffer) -> URL {
        let id = String(pushID(offer).prefix(12))
        return root.appendingPathComponent("middle-\(offer.firstBlock)..\(offer.lastBlock)-\(id)")
    }

    private func incoming(_ offer: PushOffer) -> URL {
        root.appendingPathComponent("incoming").appendingPathComponent(pushID(offer))
    }

    private func part(_ offer: PushOffer, _ index: Int) -> URL {
        incoming(offer).appendingPathComponent("\(index).part")
    }

    private func done(_ offer: PushOffer, _ index: Int) -> URL {
        incoming(offer).appendingPathComponent("\(index).done")
    }

    private func pushID(_ offer: PushOffer) -> String { hex(SystemPrimitives.sha256(offer.identifyingBytes)) }

    private func size(_ url: URL) -> UInt64? { FileIdentity(url)?.bytes }

    private func dropOthers(than kept: URL) {
        let parent = kept.deletingLastPathComponent()
        for name in (try? FileManager.default.contentsOfDirectory(atPath: parent.path)) ?? []
        where name != kept.lastPathComponent {
            try? FileManager.default.removeItem(at: parent.appendingPathComponent(name))
        }
    }

    /// Free space where `url` lies, or will lie.
    public static let freeBytes: @Sendable (URL) -> UInt64? = { url in
        var place = url
        while !FileManager.default.fileExists(atPath: place.path), place.pathComponents.count > 1 {
            place.deleteLastPathComponent()
        }
        let attributes = try? FileManager.default.attributesOfFileSystem(forPath: place.path)
        return (attributes?[.systemFreeSize] as? NSNumber)?.uint64Value
    }
}

private func gigabytes(_ bytes: UInt64) -> String { String(format: "%.2f GB", Double(bytes) / 1e9) }
