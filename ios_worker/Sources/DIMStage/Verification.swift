// Whether a directory's files are those that its manifest names, by their digests: once. What was compared is noted with
// size, time and inode in a stamp beside them, so that a start does not read gigabytes to learn what the last one knew.
import DIMCrypto
import Foundation

/// When files are compared with their digests.
public enum Verify: String, CaseIterable, Sendable {
    case always
    /// once; then again only when a file has changed
    case once
}

/// How a directory was found to be whole.
public enum Verified: Equatable, Sendable {
    /// every byte was read
    case compared
    /// nothing has changed since every byte was read
    case stamped
}

extension Manifest {
    /// The stamp's name in the directory. It is a hint of this machine about its own files: copied or altered it fits
    /// nothing, and the files are read again.
    public static let stampName = "verified.json"

    /// Compares every file with its SHA-256.
    /// - Parameter progress: called with the bytes read so far and in all
    @discardableResult
    public func verify(
        _ directory: URL, _ when: Verify = .once, progress: (UInt64, UInt64) -> Void = { _, _ in }
    ) throws(ManifestError) -> Verified {
        let files = files(in: directory)
        // as they are before they are read: a file that is changed meanwhile does not fit its stamp
        let stamp = Stamp(files)
        let place = directory.appendingPathComponent(Manifest.stampName)
        if when == .once, let stamp, stamp == Stamp(contentsOf: place) { return .stamped }

        let total = files.reduce(0) { $0 + $1.file.bytes }
        var done: UInt64 = 0
        for (url, file) in files {
            guard let digest = sha256(of: url, each: { progress(done + $0, total) }) else {
                throw ManifestError("\(url.path) cannot be read")
            }
            guard hex(digest) == file.sha256 else {
                try? FileManager.default.removeItem(at: place)
                throw ManifestError("\(url.path) was altered: copy the directory again")
            }
            done += file.bytes
        }
        // without it the next start takes longer: a directory may be read-only
        stamp?.write(to: place)
        return .compared
    }

    /// Every file that the manifest lists, and where it lies.
    private func files(in directory: URL) -> [(url: URL, file: File)] {
        var files: [(url: URL, file: File)] = []
        for (index, package) in packages.enumerated() {
            let root = directory.appendingPathComponent(Manifest.packageName(index))
            files += package.files.map { (root.appendingPathComponent($0.path), $0) }
        }
        if let selftest {
            let file = File(path: selftest.file, bytes: UInt64(selftest.bytes), sha256: selftest.sha256)
            files.append((directory.appendingPathComponent(Manifest.selfTestName), file))
        }
        return files
    }

    private struct Stamp: Codable, Equatable {
        struct Entry: Codable, Equatable {
            var sha256: String
            var bytes: UInt64
            var inode: UInt64
            var modifiedNs: Int64
        }

        /// in the manifest's order
        var files: [Entry] = []

        /// nil if one is not there.
        init?(_ listed: [(url: URL, file: File)]) {
            for (url, file) in listed {
                guard let found = FileIdentity(url) else { return nil }
                files.append(
                    Entry(
                        sha256: file.sha256, bytes: found.bytes, inode: found.inode, modifiedNs: found.modifiedNs))
            }
        }

        init?(contentsOf url: URL) {
            guard let data = try? Data(contentsOf: url), let stamp = try? JSONDecoder().decode(Stamp.self, from: data)
            else { return nil }
            self = stamp
        }

        func write(to url: URL) {
            if let data = try? JSONEncoder().encode(self) { try? data.write(to: url, options: .atomic) }
        }
    }
}
