#!/usr/bin/perl
# Makes edits of TEI's sources in the current folder, all of them or none:
#
#     perl apply.pl FOLDER NAME[,NAME]...
#
# FOLDER holds NAME.edit, whose lines begin with
#
#     #       why
#     file:   where
#     find:   what has to be there, exactly once; lines that follow each other, whatever white space is between
#     put:    what takes its place, a line each
#     new:    a line of a file that is not there yet
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
        my ($word, $rest) = $line =~ /^(file|find|put|new):(?: (.*))?$/ or stop("$name.edit has a line that is none: $line");
        $rest //= '';
        if ($word eq 'file') { $path = $rest; next }
        $path // stop("$name.edit names no file.");
        my $change = $changes[-1];
        if ($word eq 'find') {
            push @changes, $change = { path => $path, find => [], put => [] } if !$change || $change->{new} || @{ $change->{put} } || $change->{path} ne $path;
        } elsif ($word eq 'new') {
            push @changes, $change = { path => $path, new => [] } if !$change || !$change->{new} || $change->{path} ne $path;
        }
        push @{ ($change // {})->{$word} // stop("$name.edit puts before it finds.") }, $rest;
    }
    @changes or stop("$name.edit changes nothing.");
    for my $change (@changes) {
        my $where = $change->{path};
        if ($change->{new}) {
            defined($edited{$where} // content($where)) and stop("$name is not for this TEI: $where is there already.");
            $edited{$where} = join "\n", @{ $change->{new} }, '';
            next;
        }
        $edited{$where} //= content($where) // stop("$name is not for this TEI: there is no $where.");
        my $anchor = join '\s*\n\s*', map { quotemeta } @{ $change->{find} };
        my $found = () = $edited{$where} =~ /$anchor/g;
        $found == 1 or stop("$name is not for this TEI: $where has '@{ $change->{find} }' $found times, not once.");
        my $put = join "\n", @{ $change->{put} };
        $edited{$where} =~ s/$anchor/$put/;
    }
}
for my $path (sort keys %edited) {
    open my $file, '>', $path or stop("cannot write $path: $!.");
    print {$file} $edited{$path};
    close $file or stop("cannot write $path: $!.");
    print "patches: $path\n";
}
