// Files by the system's own calls, into buffers of ours. Foundation's FileHandle hands out what it reads as autoreleased
// objects on Apple systems: a loop over 2.8 GB on a thread without a pool then holds 2.8 GB.
import DIMCrypto
import Foundation

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

/// A call on a file failed.
public struct FileError: Error, Equatable, CustomStringConvertible {
    public let path: String
    public let code: Int32

    public var description: String { "\(path): \(String(cString: strerror(code)))" }
}

/// What tells a file from another, and from itself before it was changed.
public struct FileIdentity: Codable, Equatable, Sendable {
    public var bytes: UInt64
    public var inode: UInt64
    public var modifiedNs: Int64

    /// nil if there is no such file, or it is none.
    public init?(_ url: URL) {
        var status = stat()
        guard stat(url.path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { return nil }
        #if canImport(Darwin)
            let time = status.st_mtimespec
        #else
            let time = status.st_mtim
        #endif
        bytes = UInt64(status.st_size)
        inode = UInt64(status.st_ino)
        modifiedNs = Int64(time.tv_sec) * 1_000_000_000 + Int64(time.tv_nsec)
    }
}

/// An open file.
public final class RawFile {
    private let descriptor: Int32
    private let path: String

    /// bytes of the buffer that whole files are read through
    public static let piece = 1 << 20

    /// Opens `url` for reading, or, with `writing`, for both; then it is made if it is not there.
    public init(_ url: URL, writing: Bool = false) throws(FileError) {
        path = url.path
        descriptor = open(path, (writing ? O_RDWR | O_CREAT : O_RDONLY) | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw FileError(path: path, code: errno) }
    }

    deinit { close(descriptor) }

    /// Fills `buffer` as far as the file goes; 0 at its end.
    public func read(into buffer: UnsafeMutableRawBufferPointer) throws(FileError) -> Int {
        while true {
            #if canImport(Darwin)
                let count = Darwin.read(descriptor, buffer.baseAddress, buffer.count)
            #else
                let count = Glibc.read(descriptor, buffer.baseAddress, buffer.count)
            #endif
            if count >= 0 { return count }
            if errno != EINTR { throw FileError(path: path, code: errno) }
        }
    }

    /// Writes all of `bytes`.
    public func write(_ bytes: ArraySlice<UInt8>) throws(FileError) {
        let failure = bytes.withUnsafeBytes { bytes -> Int32? in
            var done = 0
            while done < bytes.count {
                #if canImport(Darwin)
                    let count = Darwin.write(descriptor, bytes.baseAddress! + done, bytes.count - done)
                #else
                    let count = Glibc.write(descriptor, bytes.baseAddress! + done, bytes.count - done)
                #endif
                if count >= 0 {
                    done += count
                } else if errno != EINTR {
                    return errno
                }
            }
            return nil
        }
        if let failure { throw FileError(path: path, code: failure) }
    }

    /// Cuts the file, and goes on at the cut.
    public func truncate(to length: UInt64) throws(FileError) {
        guard ftruncate(descriptor, off_t(length)) == 0 else { throw FileError(path: path, code: errno) }
        try seek(to: length)
    }

    /// Goes on at `offset`.
    public func seek(to offset: UInt64) throws(FileError) {
        guard lseek(descriptor, off_t(offset), SEEK_SET) >= 0 else { throw FileError(path: path, code: errno) }
    }

    /// What was written is on the disk when this returns.
    public func synchronize() throws(FileError) {
        guard fsync(descriptor) == 0 else { throw FileError(path: path, code: errno) }
    }

    /// Hands the rest of the file to `body`, piece by piece, all of them in one buffer.
    public func forEachPiece(_ body: (UnsafeRawBufferPointer) -> Void) throws(FileError) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: RawFile.piece, alignment: 4096)
        defer { buffer.deallocate() }
        while true {
            let count = try read(into: buffer)
            if count == 0 { return }
            pooled { body(UnsafeRawBufferPointer(rebasing: buffer[..<count])) }
        }
    }
}

/// Leaves `url` and what lies in it out of the device's backups: a host can send it again.
public func excludeFromBackup(_ url: URL) {
    #if canImport(Darwin)
        var values = URLResourceValues()
        values.isExcludedFromBackup = true
        var url = url
        try? url.setResourceValues(values)
    #endif
}

/// SHA-256 of a file, read in pieces; nil if it cannot be read.
/// - Parameter each: called with the bytes read so far
public func sha256(of file: URL, each: (UInt64) -> Void = { _ in }) -> [UInt8]? {
    do throws(FileError) {
        let hasher = SystemPrimitives.Hasher()
        var total: UInt64 = 0
        try RawFile(file).forEachPiece { piece in
            hasher.update(piece)
            total += UInt64(piece.count)
            each(total)
        }
        return hasher.finish()
    } catch {
        return nil
    }
}
