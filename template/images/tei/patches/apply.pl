#!/usr/bin/perl
# Makes edits of TEI's sources in the current folder, all of them or none:
#
#     perl apply.pl FOLDER NAME[,NAME]...
#
# FOLDER holds NAME.edit, whose lines begin with
#
#     #       why
#     file:   where
#     find:   what has to be there, exactly once
#     put:    what takes its place, a line each
use strict;
use warnings;

sub stop { print STDERR "patches: @_\n"; exit 1 }

sub content {
    my ($path) = @_;
    open my $file, '<', $path or return;
    local $/;
    return scalar <$file>;
}

@ARGV == 2 or stop('usage: apply.pl FOLDER NAME[,NAME]...');
my ($folder, $names) = @ARGV;
my %edited;    # text by path
for my $name (split /,/, $names) {
    my $edit = content("$folder/$name.edit") // stop("there is no edit $name.");
    my ($path, @changes);
    for my $line (split /\n/, $edit) {
        next if $line =~ /^(#|\s*$)/;
        my ($word, $rest) = $line =~ /^(file|find|put): (.*)$/ or stop("$name.edit has a line that is none: $line");
        if ($word eq 'file') { $path = $rest }
        elsif ($word eq 'find') { push @changes, [$path // stop("$name.edit names no file."), $rest] }
        else { push @{ $changes[-1] // stop("$name.edit puts before it finds.") }, $rest }
    }
    @changes or stop("$name.edit changes nothing.");
    for my $change (@changes) {
        my ($where, $anchor, @put) = @$change;
        $edited{$where} //= content($where) // stop("$name is not for this TEI: there is no $where.");
        my $found = () = $edited{$where} =~ /\Q$anchor\E/g;
        $found == 1 or stop("$name is not for this TEI: $where has '$anchor' $found times, not once.");
        my $put = join "\n", @put;
        $edited{$where} =~ s/\Q$anchor\E/$put/;
    }
}
for my $path (sort keys %edited) {
    open my $file, '>', $path or stop("cannot write $path: $!.");
    print {$file} $edited{$path};
    close $file or stop("cannot write $path: $!.");
    print "patches: $path\n";
}
